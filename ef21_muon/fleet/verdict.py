"""The headers of workers' messages, the rules for which messages count, and a round's result.

All workers reach the same result, since all apply these rules to the same headers and messages.
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

from ef21_muon.checks.arithmetic import SAFE, WHY
from ef21_muon.fleet.admission import FleetRefused
from ef21_muon.transport.fixed import Traffic

HEADER = Struct(">QQQ??")
LARGEST = torch.finfo(torch.float32).max  # of a squared length
FAR = 100  # a message so many times as long as the others' is worth a warning
REFUSALS = 3  # a worker ends when so many of its messages in a row were refused
DIVERGED = 3  # a worker ends when its W has diverged so many times in a row
INSTEAD = f"give all workers {SAFE}, or leave this one out"

log = logging.getLogger("ef21_muon")


class Header(NamedTuple):
    """What precedes a worker's message.

    Attributes:
        committed: the number of messages that this worker's W consists of.
        digest: a fingerprint of all that workers share, below 2^64.
        steps: the local steps after which the message was made.
        counts: whether the message stands for local steps.
        finite: whether the parameters and state that it was made from are finite.
    """

    committed: int
    digest: int
    steps: int
    counts: bool
    finite: bool

    @property
    def history(self) -> tuple[int, int]:
        """(committed, digest): equal for workers whose messages may be averaged."""
        return self.committed, self.digest

    def packed(self) -> Tensor:
        """The header as uint8 (HEADER.size,)."""
        return torch.frombuffer(bytearray(HEADER.pack(*self)), dtype=torch.uint8)

    @classmethod
    def unpacked(cls, row: Tensor) -> "Header":
        """The header that `packed` has been called of."""
        return cls(*HEADER.unpack(bytes(row.tolist())))


def history_of(headers: Sequence[Header]) -> tuple[int, int]:
    """The history that the fleet keeps; workers with another one adopt its state.

    It is one of a worker that is finite, then one of most messages, then one of most workers.
    """
    histories = [header.history for header in headers]
    finite = {header.history for header in headers if header.finite}
    return max(histories, key=lambda one: (one in finite, one[0], histories.count(one), one))


@dataclass(frozen=True)
class Quorum:
    """The result of a round.

    Attributes:
        messages: how many messages count.
        step: the number of local steps that they stand for; None if none counts.
        workers: the numbers of the workers that took part.
        healed: whether this worker adopted the state of the others.
        diverged: how often in this round this worker had another history than the others.
        history: in hexadecimal, the number of messages in W before the round, and the digest of
            what all workers shared.
        tries: how many quorums the round took.
        seconds: of waiting and sending.
        traffic: the bytes of this rank, of all tries and of state.
        refused: the numbers of workers whose messages are not finite and do not count.
        notes: what went wrong, in words.
    """

    messages: int
    step: int | None
    workers: tuple[int, ...]
    healed: bool
    diverged: int
    history: str
    tries: int
    seconds: float
    traffic: Traffic
    refused: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


class MessageChecks:
    """Refuses messages that are not finite, and names those that are far longer than the others.

    The log has a warning of the former in every round, of the latter in the first of several rounds
    in a row.

    Args:
        worker: this worker's number.
        quiet: whether to log nothing, as on all ranks of a worker but one.
    """

    def __init__(self, worker: int, quiet: bool = False):
        self.worker, self.quiet = worker, quiet
        self._refused = 0  # messages of this worker in a row
        self._diverged = 0  # rounds in a row, from the same messages
        self._far: set[int] = set()  # workers, in the last round

    def check(
        self, squares: Mapping[int, float], step: int | None, all_workers: bool
    ) -> tuple[list[int], list[str]]:
        """Check the messages of a round.

        Args:
            squares: the squared length of each message that counts, by worker.
            step: the local steps that the messages stand for.
            all_workers: whether all workers of the round sent such a message.

        Returns:
            The workers whose messages are refused, and notes for the record.

        Raises:
            FleetRefused: if no worker's message is finite, or if this worker's was not finite
                REFUSALS times in a row.
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
        """Note, in every round, whether this worker has computed another W from the same messages.

        Raises:
            FleetRefused: the DIVERGED-th time in a row. Such a worker would adopt the others' state
                again and again, and its messages would never count.
        """
        self._diverged = self._diverged + 1 if diverged else 0
        if self._diverged == DIVERGED:
            raise FleetRefused(
                f"this worker had another W than the others {DIVERGED} times in a row, of the same "
                f"messages: {WHY}, and so it never counts: {INSTEAD}"
            )


def far_off(squares: Mapping[int, float]) -> dict[int, float]:
    """Find finite messages that are far longer than the median of the others.

    Args:
        squares: the squared length of each message, by worker.

    Returns:
        How many times as long each of these messages is, by worker.
    """
    lengths = {one: math.sqrt(square) for one, square in squares.items() if square <= LARGEST}
    found = {}
    for worker, length in lengths.items():
        others = [other for one, other in lengths.items() if one != worker]
        usual = median_low(others) if others else 0.0
        if usual and length > FAR * usual:
            found[worker] = length / usual
    return found
