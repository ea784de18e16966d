"""Compressors C_j^k that change with the round: the theorems allow it, sizes stay known to all."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf

from ef21_muon.compressors import Compressor
from ef21_muon.exchange import Exchange, cut


class Switch:
    """`first` in the rounds before `start`, counted from 0, and `later` from it on, for w2s.

    `later` may be a Switch of a later start, for more than two levels. Raises ValueError for
    anything but compressors, and a start that is no round after the first.
    """

    def __init__(self, first: Compressor, later: "Compressor | Switch", start: int):
        for name, given, allowed in (
            ("first", first, Compressor),
            ("later", later, (Compressor, Switch)),
        ):
            if not isinstance(given, allowed):
                raise ValueError(f"Switch got {name}={given!r}: give a Compressor of ef21_muon")
        if not (type(start) is int and start > 0):
            raise ValueError(f"Switch got start={start}: give a round, a whole number above 0")
        if isinstance(later, Switch) and later.start <= start:
            raise ValueError(
                f"Switch got start={start} before a later one of {later.start}: let it rise"
            )
        self.first, self.later, self.start = first, later, start

    def __str__(self) -> str:
        return f"{self.first}, then {self.later}"


def starts(w2s: Compressor | Switch) -> set[int]:
    """The rounds, counted from 0, from which on it is another compressor."""
    return {w2s.start} | starts(w2s.later) if isinstance(w2s, Switch) else {0}


def in_round(w2s: Compressor | Switch, round: int) -> Compressor:
    """The compressor of a round."""
    while isinstance(w2s, Switch):
        w2s = w2s.first if round < w2s.start else w2s.later
    return w2s


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


def total(phases: Sequence[Phase], rounds: int, size: Callable[[Exchange], int]) -> int:
    """The sum over the first `rounds` rounds of what `size` says of each round's exchange."""
    ends = [*(phase.start for phase in phases[1:]), inf]
    return sum(
        max(0, min(rounds, end) - phase.start) * size(phase.exchange)
        for phase, end in zip(phases, ends, strict=True)
    )
