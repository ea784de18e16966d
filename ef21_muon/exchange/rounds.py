"""Which steps a round has."""

from bisect import bisect_right
from collections.abc import Mapping
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
