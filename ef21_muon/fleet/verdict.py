"""What workers say before their messages, which of these count, and what a round has come to.

All workers find it alike, of the same facts.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from ef21_muon.arithmetic import SAFE, WHY
from ef21_muon.fleet.admission import FleetRefused
from ef21_muon.transport.fixed import Traffic

HEAD = Struct(">QQQ??")
LARGEST = torch.finfo(torch.float32).max  # of a squared length
FAR = 100  # times as long as the others' messages, which is worth a word
REFUSALS = 3  # of a worker's messages, one after the other, with which it ends
DIVERGED = 3  # times in a row that a worker comes with another W of the same messages
INSTEAD = f"give all workers {SAFE}, or leave this one out"

log = logging.getLogger("ef21_muon")


class Head(NamedTuple):
    """What a worker says before its message."""

    committed: int  # messages in W so far
    digest: int  # of all that workers share
    steps: int  # local ones, that the message was made after
    counts: bool
    finite: bool  # whether what it was made of is

    @property
    def history(self) -> tuple[int, int]:
        """Equal for workers whose messages may be averaged."""
        return self.committed, self.digest

    def packed(self) -> Tensor:
        """As (HEAD.size,) uint8."""
        return torch.frombuffer(bytearray(HEAD.pack(*self)), dtype=torch.uint8)

    @classmethod
    def unpacked(cls, row: Tensor) -> "Head":
        return cls(*HEAD.unpack(bytes(row.tolist())))


def history_of(heads: Sequence[Head]) -> tuple[int, int]:
    """The one that goes on: of a worker that is finite, of most messages, then of most workers."""
    histories = [head.history for head in heads]
    finite = {head.history for head in heads if head.finite}
    return max(histories, key=lambda one: (one in finite, one[0], histories.count(one), one))


@dataclass(frozen=True)
class Quorum:
    """The result of a round of workers, which have numbers."""

    messages: int  # how many count
    step: int | None  # up to which they tell, None without one
    workers: tuple[int, ...]  # that met
    healed: bool  # whether this one took over what the others share
    diverged: int  # how often this one had another history than the others
    history: str  # in hexadecimal, the messages in W before, and the digest of what all shared
    tries: int  # quorums that it took
    seconds: float  # of waiting and sending
    traffic: Traffic  # of this rank, of all tries, and of state
    refused: tuple[int, ...] = ()  # whose messages are not finite and do not count
    notes: tuple[str, ...] = ()  # what was amiss, in words


class Verdicts:
    """Of a worker's rounds: which messages are not finite, and which are far longer than others.

    A warning in the log says the former in every round, the latter in the first of several.
    """

    def __init__(self, worker: int, quiet: bool = False):
        self.worker, self.quiet = worker, quiet  # for all but one rank of the worker
        self._refused = 0  # of its own messages, one after the other
        self._diverged = 0  # times in a row, of the same messages
        self._far: set[int] = set()  # workers, in the last round

    def of(
        self, squares: Mapping[int, float], step: int | None, all_workers: bool
    ) -> tuple[list[int], list[str]]:
        """Of a round the workers whose messages are refused, and what there is to say.

        squares: of each message that counts the squared length, by worker; all_workers: whether all
        that met sent one. Raises FleetRefused where none is finite, or this worker's not again.
        """
        broken = [worker for worker, square in squares.items() if not square <= LARGEST]
        notes = [f"worker {one}'s message is not finite: it does not count" for one in broken]
        far = {
            one: f"worker {one}'s message is {times:.1e} times as long as the others'"
            for one, times in far_off(squares).items()
        }
        new = [note for one, note in far.items() if one not in self._far]
        for note in [*notes, *new] if not self.quiet else ():
            log.warning("step %s: %s", step, note)
        self._far = {*far}
        if self.worker in squares:
            self._refused = self._refused + 1 if self.worker in broken else 0
        advice = "lower the learning rate, or look at the data of the steps before"
        if broken and all_workers and len(broken) == len(squares):
            raise FleetRefused(f"no worker's message is finite after step {step}: {advice}")
        if self._refused == REFUSALS:
            raise FleetRefused(
                f"worker {self.worker}'s messages were not finite {REFUSALS} times one after the "
                f"other, the last after step {step}: {advice}"
            )
        return broken, [*notes, *far.values()]

    def note_diverged(self, diverged: bool) -> None:
        """Of every round, whether this worker's W of the same messages was another.

        Raises FleetRefused the DIVERGED-th time in a row: it would heal for ever, and never count.
        """
        self._diverged = self._diverged + 1 if diverged else 0
        if self._diverged == DIVERGED:
            raise FleetRefused(
                f"this worker had another W than the others {DIVERGED} times in a row, of the same "
                f"messages: {WHY}, and so it never counts: {INSTEAD}"
            )


def far_off(squares: Mapping[int, float]) -> dict[int, float]:
    """Of the finite messages that are far longer than the others' median how many times."""
    lengths = {one: math.sqrt(square) for one, square in squares.items() if square <= LARGEST}
    found = {}
    for worker, length in lengths.items():
        others = [other for one, other in lengths.items() if one != worker]
        usual = median_low(others) if others else 0.0
        if usual and length > FAR * usual:
            found[worker] = length / usual
    return found
