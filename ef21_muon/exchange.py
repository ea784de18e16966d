"""The exchange of a compressor for another one, between the rounds of a training."""

from functools import partial
from typing import TYPE_CHECKING

from ef21_muon.checks.arithmetic import of_decoding, where_bits_agree
from ef21_muon.checks.guards import Guards
from ef21_muon.checks.identity import described, settings_of
from ef21_muon.checks.settings import compressor_of
from ef21_muon.compressors import Compressor
from ef21_muon.transport.agreement import require_equal_settings

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating


def exchange(optimizer: "Communicating", w2s: Compressor | str, group: str | None) -> None:
    """Send with another compressor from the next round on; see `Communicating`."""
    w2s = compressor_of("w2s", w2s)
    rules = optimizer.rules
    chosen = [i for i, rule in enumerate(rules) if group in (None, rule.get("name"))]
    if not (optimizer.mesh.total(len(chosen))[0] if optimizer.mesh else chosen):
        names = ", ".join(str(rule.get("name")) for rule in rules)
        raise ValueError(f"group={group!r} is not a group of this optimizer: it has {names}")
    if any("message" in batch.state for batch in optimizer.batches):
        raise ValueError(
            "a compressor is not exchanged with a sync_delay: build the optimizer anew"
        )
    new = [rule | {"w2s": w2s} if i in chosen else rule for i, rule in enumerate(rules)]
    place = optimizer.device, optimizer.process_group
    require_equal_settings({f"w2s of group {i}": described(w2s) for i in chosen}, *place)
    where_bits_agree([optimizer.server or ""], partial(of_decoding, new), *place)
    for index in chosen:
        rules[index]["w2s"] = w2s
    for batch in optimizer.batches:
        if batch.group in chosen:
            batch.up.use(w2s)
    optimizer.guards = Guards(optimizer, optimizer.guards.layers)
    optimizer._built_as = settings_of(optimizer)
