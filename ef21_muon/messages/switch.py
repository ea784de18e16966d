"""Compressors C_j^k that change with the round: the theorems allow it, sizes stay known to all."""

from ef21_muon.messages.compressors import Compressor


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
