"""Which steps a round has, and which messages travel in which of them."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil
from numbers import Integral


class Rounds:
    """Rounds of `every` steps, or of other numbers of steps from some steps on.

    every: a number, or {first step: number}, as {0: 120, 360: 60}, where a stretch that is followed
    by another has whole rounds. Steps and rounds count from 0. Raises ValueError for other numbers.
    """

    def __init__(self, every: int | Mapping[int, int]):
        stretches = dict(every) if isinstance(every, Mapping) else {0: every}
        if not stretches or min(stretches) != 0:
            raise ValueError(f"every={every} is not allowed: give the steps of a round from step 0")
        self._steps = sorted(stretches)
        self._every = [stretches[step] for step in self._steps]
        for length in self._every:
            whole = isinstance(length, Integral) and not isinstance(length, bool)
            if not (whole and length >= 1):
                raise ValueError(f"every={length} is not allowed: give a whole number above 0")
        self._rounds = [0]  # before each stretch
        for place, step in enumerate(self._steps[1:]):
            lasting, length = step - self._steps[place], self._every[place]
            if lasting % length:
                raise ValueError(
                    f"every={every} is not allowed: {lasting} steps from step {self._steps[place]} "
                    f"on are no whole rounds of {length}, give a multiple"
                )
            self._rounds.append(self._rounds[-1] + lasting // length)

    @property
    def lengths(self) -> list[int]:
        """The steps that a round may have."""
        return self._every

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """The first step of every stretch, and the steps of its rounds."""
        return list(zip(self._steps, self._every, strict=True))

    def of(self, step: int) -> tuple[int, int, int]:
        """The round of a step, the step's place in it, and how many steps that round has."""
        stretch = bisect_right(self._steps, step) - 1
        length = self._every[stretch]
        rounds, place = divmod(step - self._steps[stretch], length)
        return self._rounds[stretch] + rounds, place, length

    def first_step(self, round: int) -> int:
        """The first step of a round."""
        stretch = bisect_right(self._rounds, round) - 1
        return self._steps[stretch] + (round - self._rounds[stretch]) * self._every[stretch]

    def __str__(self) -> str:
        first, *later = zip(self._every, self._steps, strict=True)
        told = (f"{length} from step {step + 1}" for length, step in later)
        return ", ".join([str(first[0]), *told])


class Turns:
    """When buckets are sent and arrive, where a round has many steps.

    Steps count from 0. Without `streaming` all buckets have their turn in the last step of a round;
    with it every bucket has its own, so that the bytes that were sent grow evenly. A message takes
    `delay` steps from the turn of its bucket to the servers, and as many back, but where nothing is
    sent back.

    sizes: the bytes of every bucket; ways: 2 where servers send something back, else 1. Raises
    ValueError for a delay that is no shorter than a round.
    """

    def __init__(
        self, sizes: Sequence[int], rounds: Rounds, delay: int, ways: int, streaming: bool
    ):
        self.rounds, self.delay, self.ways = rounds, delay, ways
        shortest = min(rounds.lengths)
        if ways * delay >= shortest:
            raise ValueError(
                f"delay={delay} is not allowed with every={rounds}: what is under way has to arrive"
                f" before the next message, give at most {(shortest - 1) // ways}"
            )
        sent = list(accumulate(sizes))
        self._turns = {
            length: [
                ceil(length * upto / sent[-1]) - 1 if streaming else length - 1 for upto in sent
            ]
            for length in rounds.lengths
        }

    def departing(self, step: int) -> list[int]:
        """The buckets whose turn a step is."""
        if step < 0:
            return []
        _, place, length = self.rounds.of(step)
        return [bucket for bucket, turn in enumerate(self._turns[length]) if turn == place]

    def at_servers(self, step: int) -> list[int]:
        """The buckets whose messages come to the servers with a step."""
        return self.departing(step - self.delay)

    def arriving(self, step: int) -> list[int]:
        """The buckets that come back to the workers with a step."""
        return self.departing(step - self.ways * self.delay)

    def under_way(self, steps: int) -> set[int]:
        """The buckets whose messages have not come to the servers after as many steps."""
        later = range(steps, steps + self.delay)
        return {bucket for step in later for bucket in self.at_servers(step)}
