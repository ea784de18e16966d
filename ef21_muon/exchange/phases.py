"""Rounds in which sizes stay the same: their compressors, collectives and messages."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ef21_muon.exchange.collectives import Exchange
from ef21_muon.exchange.placement import cut
from ef21_muon.messages.compressors import Compressor
from ef21_muon.messages.switch import Switch, in_round


@dataclass(frozen=True)
class Phase:
    """Rounds from `start` on in which sizes stay the same: batch b of layers is sent by w2s[b].

    Messages of the batches in a bucket travel together.
    """

    start: int
    w2s: list[Compressor]
    exchange: Exchange
    buckets: list[range]


def new_phases(
    batches: Sequence,
    rules: Sequence[Compressor | Switch],
    begins: Collection[int],
    buckets: int,
    group,
) -> list[Phase]:
    """The phases of batches of layers that are sent by `rules`, in up to `buckets` messages.

    `begins`: the rounds from which on phases are.
    """
    back = [batch.s2w.payload_bytes(*batch.shape) for batch in batches]
    phases = []
    for start in sorted(begins):
        w2s = [
            in_round(rule, start).fit(*batch.shape)
            for rule, batch in zip(rules, batches, strict=True)
        ]
        sizes = [c.payload_bytes(*b.shape) for c, b in zip(w2s, batches, strict=True)]
        exchange = Exchange([batch.owned_by for batch in batches], sizes, back, group)
        of_batches = [len(b.params) * size for b, size in zip(batches, sizes, strict=True)]
        phases.append(Phase(start, w2s, exchange, cut(of_batches, buckets)))
    return phases


def current(phases: Sequence[Phase], round: int) -> Phase:
    """The phase of a round."""
    return next(phase for phase in reversed(phases) if phase.start <= round)
