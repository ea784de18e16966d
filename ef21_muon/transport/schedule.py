"""Which steps a round has, and which messages travel in which of them."""

from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import ceil
from operator import itemgetter
from typing import TypeAlias

from ef21_muon.settings import whole_number
from ef21_muon.transport.fixed import Underway, run


class Rounds:
    """Rounds of `every` steps, or of other numbers of steps from some steps on.

    every: a number, or {first step: number}, as {0: 120, 360: 60}, where a stretch that is followed
    by another has whole rounds. Steps and rounds count from 0. `stretches` has the first step of
    each, and the steps of its rounds; `lengths` the latter. Raises ValueError for other numbers.
    """

    def __init__(self, every: int | Mapping[int, int]):
        stretches = dict(every) if isinstance(every, Mapping) else {0: every}
        if not stretches or min(stretches) != 0:
            raise ValueError(
                f"sync_every={every} is not allowed: give the steps of a round from step 0"
            )
        self.stretches = sorted(stretches.items())
        self.lengths = [whole_number("sync_every", length, least=1) for _, length in self.stretches]
        self._rounds = [0]  # before each stretch
        for (first, length), (then, _) in pairwise(self.stretches):
            if (then - first) % length:
                raise ValueError(
                    f"sync_every={every} is not allowed: {then - first} steps from step {first} on are "
                    f"no whole rounds of {length}, give a multiple"
                )
            self._rounds.append(self._rounds[-1] + (then - first) // length)

    def of(self, step: int) -> tuple[int, int, int]:
        """The round of a step, the step's place in it, and how many steps that round has."""
        stretch = bisect_right(self.stretches, step, key=itemgetter(0)) - 1
        first, length = self.stretches[stretch]
        rounds, place = divmod(step - first, length)
        return self._rounds[stretch] + rounds, place, length

    def __str__(self) -> str:
        (_, first), *later = self.stretches
        told = (f"{length} from step {step + 1}" for step, length in later)
        return ", ".join([str(first), *told])


RoundOf: TypeAlias = Callable[[Sequence, int], Generator]


class Turns:
    """The rounds of buckets of batches, where a round has many steps; some are under way.

    Steps count from 0. Without `streaming` all buckets have their turn in the last step of a round;
    with it every bucket has its own, so that the bytes that were sent grow evenly. A message takes
    `sync_delay` steps from the turn of its bucket to the servers, and as many back, but where nothing is
    sent back.

    `round_of`, where it is asked for, makes of a bucket its round, a generator for `Underway`: from
    leg 0 on, or of one that was under way at a checkpoint from leg 1, to the servers, or 2, back.
    Raises ValueError for a delay that is no shorter than a round.
    """

    def __init__(
        self, buckets: Sequence[Sequence], rounds: Rounds, sync_delay: int, streaming: bool
    ):
        self.buckets, self.rounds, self.sync_delay = buckets, rounds, sync_delay
        self.ways = 1 if all(batch.replicated for bucket in buckets for batch in bucket) else 2
        shortest = min(rounds.lengths)
        if self.ways * sync_delay >= shortest:
            raise ValueError(
                f"sync_delay={sync_delay} is not allowed with sync_every={rounds}: what is under way has to arrive"
                f" before the next message, give at most {(shortest - 1) // self.ways}"
            )
        sizes = [sum(len(b.params) * b.up.size for b in bucket) for bucket in buckets]
        sent = list(accumulate(sizes))
        self._turns = {
            length: [ceil(length * one / sent[-1]) - 1 if streaming else length - 1 for one in sent]
            for length in rounds.lengths
        }
        self._under_way: dict[int, Underway] = {}
        self._settled = -1  # the last step of which all has arrived before its time

    def take(self, step: int, round_of: RoundOf, timer) -> None:
        """What is due after a step."""
        for bucket in self.departing(step):
            self._under_way[bucket] = Underway(round_of(self.buckets[bucket], 0), timer)
        self._arrive(step, step, round_of, timer)

    def finish(self, step: int, round_of: RoundOf, timer) -> None:
        """After the last step: what is under way arrives, and the other buckets take a round."""
        for later in range(step + 1, step + 1 + self.ways * self.sync_delay):
            self._arrive(later, step, round_of, timer)
        just_sent = self.departing(step)
        left = [bucket for number, bucket in enumerate(self.buckets) if number not in just_sent]
        run((round_of(bucket, 0) for bucket in left), timer)
        self._settled = step

    def _arrive(self, step: int, last: int, round_of: RoundOf, timer) -> None:
        """What arrives with a step, of what has departed up to the last one."""
        for leg, sent in ((1, step - self.sync_delay), (2, step - self.ways * self.sync_delay)):
            for bucket in self.departing(sent) if self._settled < sent <= last else ():
                one = self._under_way.pop(bucket, None)
                if one is None:  # after an interruption it is sent again
                    one = Underway(round_of(self.buckets[bucket], leg), timer)
                if one.go_on():  # in a fleet this may drop all that is under way
                    self._under_way[bucket] = one

    def departing(self, step: int) -> list[int]:
        """The buckets whose turn a step is."""
        if step < 0:
            return []
        _, place, length = self.rounds.of(step)
        return [bucket for bucket, turn in enumerate(self._turns[length]) if turn == place]

    def late(self, steps: int) -> list:
        """The batches whose messages have not come to the servers after as many steps."""
        departed = range(max(steps - self.sync_delay, self._settled + 1), steps)
        buckets = {bucket for step in departed for bucket in self.departing(step)}
        return [batch for bucket in buckets for batch in self.buckets[bucket]]

    def unsent(self, steps: int) -> int:
        """How many of the last steps W is without, after as many steps."""
        if self._settled == steps - 1:
            return 0
        return self.rounds.of(steps)[1] or len(self._under_way)

    def drop(self) -> None:
        """Wait for what is under way, or what is sent next would be taken for it, and forget it."""
        for one in self._under_way.values():
            one.wait()
        self._under_way, self._settled = {}, -1

    def __getstate__(self) -> dict:
        """Without what is under way, which a copy sends again."""
        return vars(self) | {"_under_way": {}}
