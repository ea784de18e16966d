"""Checks that workers get the same bits from what each of them computes for itself.

Sums of products have other last digits on another processor, with another BLAS library, or with
another number of threads. If every worker decodes a message or takes a step for itself, W then
diverges between workers.
"""

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress

import torch
from torch import Tensor
from torch.optim import Optimizer

from ef21_muon.compressors.base import numbers
from ef21_muon.layers import named_layers
from ef21_muon.norms.lmo import AdaptiveRadius, along
from ef21_muon.transport.agreement import fingerprint, first_difference
from ef21_muon.transport.fixed import Group, place_in

SIDE = 512  # the largest side of a matrix that is tried; larger ones are cut to it

# The first words of results that all workers compute only with server="replicated".
REPLICATED = ("w2s", "step")
WHY = "their processors, BLAS libraries or numbers of threads differ"
SAFE = "compressors without matrix products (quantize, sign, topk, chunk_topk, randk, top_columns)"
# What to do if bits differ, by the first word of the result.
ADVICE = {
    "w2s": "with server=replicated every rank decodes all messages: give server=sharded or rank0, "
    f"or for w2s {SAFE}",
    "step": "with server=replicated every rank takes the servers' step: give server=sharded or "
    "rank0",
    "s2w": f"every rank decodes what the servers send: give for s2w identity, or {SAFE}",
    "inner": "every rank takes this step by itself: start all ranks on one kind of processor, with "
    "the same settings of libraries and threads",
}

Results = Iterator[tuple[str, Tensor]]

log = logging.getLogger("ef21_muon")


def of_messages(entry: str, rules: Sequence[dict]) -> Results:
    """Yield what a sample message decodes to, for every compressor and shape of layers.

    Args:
        entry: "w2s" or "s2w".
        rules: parameter groups with their compressors.
    """
    tried = set()
    for index, _, parameter, (m, n) in named_layers(rules):
        compressor = rules[index][entry].fit(m, n)
        name = f"{entry}={compressor}, {m} x {n}"
        if not (compressor.lossless or name in tried):
            tried.add(name)
            m, n = min(m, SIDE), min(n, SIDE)
            yield name, compressor.decode(compressor.sample(m, n).to(parameter.device), m, n)


def of_decoding(rules: Sequence[dict], server: str) -> Results:
    """Yield what every rank decodes: s2w messages, and w2s messages if server="replicated"."""
    yield from of_messages("s2w", rules)
    if server == "replicated":
        yield from of_messages("w2s", rules)


def of_norms(groups: list[dict]) -> Results:
    """Yield the step of line 3 for every norm and shape in parameter groups of EF21Muon."""
    tried = set()
    for index, _, parameter, (m, n) in named_layers(groups):
        group, device = groups[index], parameter.device
        name = f"step of {group['norm']!r}, {m} x {n} (group {index})"
        if name not in tried:
            tried.add(name)
            gradient = numbers(1, min(m, SIDE), min(n, SIDE)).to(device)
            # Compiling for these shapes would take long, and would use up the recompile limit.
            eager = torch.compiler.set_stance("force_eager") if gradient.is_cuda else nullcontext()
            with eager, torch.autocast(device.type, enabled=False), torch.no_grad():
                step = _norm_step(gradient, group)
            yield name, step


def _norm_step(gradient: Tensor, group: dict) -> Tensor:
    """Return the group's step for a gradient, with the sums that its radius needs."""
    if group["lmo_feedback"]:
        return group["norm"].projected(gradient)
    step = group["norm"].lmo(gradient)
    if not isinstance(group["radius"], AdaptiveRadius):
        return step
    by_rows = along(gradient.transpose(0, 1), step.transpose(0, 1))  # several sums
    return torch.cat([step.flatten(), along(gradient, step), by_rows])


def of_inner(inner: Iterable[Optimizer]) -> Results:
    """Yield two steps of other parameters, for every group of torch's own optimizers.

    Optimizers of other modules are left out, since a step of theirs may change anything, and so are
    optimizers of sparse gradients.
    """
    for optimizer in inner:
        if type(optimizer).__module__.startswith("torch.optim"):
            for index, group in enumerate(optimizer.param_groups):
                if group["params"]:
                    with suppress(RuntimeError):
                        stepped = _stepped(optimizer, group)
                        yield f"inner={type(optimizer).__name__}, group {index}", stepped


@torch.no_grad()
def _stepped(optimizer: Optimizer, group: dict) -> Tensor:
    """Return a parameter and its state after two steps of a copy of the optimizer.

    The copy starts without state and hooks.
    """
    like = group["params"][0]
    parameter = (numbers(48, 64) / (1 << 23)).to(like).requires_grad_()
    other = _like(optimizer, [{**group, "params": [parameter]}])
    for _ in range(2):
        parameter.grad = parameter.detach() * parameter.detach()
        type(optimizer).step(other)
    own = [one for one in other.state[parameter].values() if isinstance(one, Tensor)]
    return torch.cat([tensor.detach().flatten().float() for tensor in (parameter, *own)])


def _like(optimizer: Optimizer, groups: list[dict]) -> Optimizer:
    """A copy of other parameters, without state and hooks."""
    other = object.__new__(type(optimizer))
    vars(other).update(vars(optimizer), state=defaultdict(dict))
    vars(other).update({key: OrderedDict() for key in vars(other) if key.endswith("_hooks")})
    other.param_groups = groups
    return other


@torch.no_grad()
def first_state(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """What the first step of an optimizer of torch makes, zero, by the parameter's number.

    Empty for an optimizer that is not torch's own, or does not step on zeros.
    """
    groups = [
        {**group, "params": [torch.zeros_like(p).requires_grad_() for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    other = _like(optimizer, groups)
    if type(optimizer).__module__.startswith("torch.optim"):
        with suppress(RuntimeError):
            type(optimizer).step(other)
    return {
        number: {key: torch.zeros_like(one) for key, one in other.state[parameter].items()}
        for number, parameter in enumerate(parameters)
        if parameter in other.state
    }


def digests(results: Results) -> dict[str, int]:
    """Return the fingerprint of each result by its name. Waits for the device."""
    return {name: int(fingerprint(result).item()) for name, result in results}


def unlike(results: Results, device: torch.device, group: Group) -> tuple[str, int] | None:
    """Return the name of the first result whose bits differ between ranks, and such a rank.

    Returns:
        (name, rank), the same on all ranks; None if all bits agree.
    """
    found = first_difference(digests(results), device, group, only_common=True)
    return found and (found[1], found[0])


def where_bits_agree(
    allowed: Sequence[str],
    computed: Callable[[str], Results],
    device: torch.device,
    group: Group,
) -> str:
    """Return the first placement in which ranks compute the same bits.

    If "replicated" is the first of several and steps or decoded messages differ there, the next
    placement is tried, with a warning on rank 0.

    Args:
        allowed: placements, the preferred one first.
        computed: a function of a placement that yields what every rank computes for itself in it.
        device: the device of the parameters.
        group: the process group of the ranks.

    Raises:
        ValueError: if ranks get other bits in all allowed placements; it names the result, a rank
            and what to do.
    """
    server, *others = allowed
    rank, ranks = place_in(group)
    found = unlike(computed(server), device, group) if ranks > 1 else None
    if found is None:
        return server
    what, other = found
    words = f"rank {other} gets other bits than rank 0 of {what}: {WHY}, and "
    others = [one for one in others if one != "replicated"]
    if not (server == "replicated" and others and what.startswith(REPLICATED)):
        raise ValueError(words + advice_for(what))
    if rank == 0:
        log.warning("%sserver=auto is therefore %s, not replicated", words, others[0])
    return where_bits_agree(others, computed, device, group)


def advice_for(name: str) -> str:
    """Return what to do if workers get other bits of the result of this name."""
    return next(advice for kind, advice in ADVICE.items() if name.startswith(kind))
