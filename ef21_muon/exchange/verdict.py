"""Which messages count, of workers that come and go, as all of them find alike."""

import logging
import math
from collections.abc import Mapping
from statistics import median_low

import torch

from ef21_muon.exchange.admission import FleetRefused

LARGEST = torch.finfo(torch.float32).max  # of a squared length
FAR = 100  # times as long as the others' messages, which is worth a word
REFUSALS = 3  # of a worker's messages, one after the other, with which it ends

log = logging.getLogger("ef21_muon")


class Verdicts:
    """Of a worker's rounds: which messages are not finite, and which are far longer than others.

    Those of the first kind are said in the log, with a warning, in every round; those of the second
    in the first round of several.
    """

    def __init__(self, worker: int, quiet: bool = False):
        self.worker, self.quiet = worker, quiet  # for all but one rank of the worker
        self._refused = 0  # of its own messages, one after the other
        self._far: set[int] = set()  # workers, in the last round

    def of(
        self, squares: Mapping[int, float], step: int | None, all_workers: bool
    ) -> tuple[list[int], list[str]]:
        """Of a round the workers whose messages are refused, and what there is to say.

        squares: the squared length of each message that stands for steps, by worker; all_workers:
        whether all that met sent one. Raises FleetRefused where none is finite, and where this
        worker's are not REFUSALS times.
        """
        broken = [worker for worker, square in squares.items() if not square <= LARGEST]
        notes = [f"worker {one}'s message is not finite: it does not count" for one in broken]
        far = {
            one: f"worker {one}'s message is {times:.1e} times as long as the others'"
            for one, times in far_off(squares).items()
        }
        for note in [*notes, *(far[one] for one in far if one not in self._far)]:
            if not self.quiet:
                log.warning("step %s: %s", step, note)
        self._far = {*far}
        if self.worker in squares:
            self._refused = self._refused + 1 if self.worker in broken else 0
        if broken and all_workers and len(broken) == len(squares):
            self._end(f"no worker's message is finite after step {step}")
        if self._refused == REFUSALS:
            self._end(
                f"worker {self.worker}'s messages were not finite {REFUSALS} times one after the "
                f"other, the last after step {step}"
            )
        return broken, [*notes, *far.values()]

    @staticmethod
    def _end(what: str) -> None:
        raise FleetRefused(
            f"{what}: lower the learning rate, or look at the data of the steps before"
        )


def far_off(squares: Mapping[int, float]) -> dict[int, float]:
    """Of the messages that are far longer than the others' median how many times, by worker.

    Those that are not finite, or that float32 cannot square, are left out.
    """
    lengths = {one: math.sqrt(square) for one, square in squares.items() if square <= LARGEST}
    found = {}
    for worker, length in lengths.items():
        others = [other for one, other in lengths.items() if one != worker]
        usual = median_low(others) if others else 0.0
        if usual and length > FAR * usual:
            found[worker] = length / usual
    return found
