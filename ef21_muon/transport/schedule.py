"""When local steps communicate: the rounds, and the steps after which each bucket sends.

A round is `sync_every` steps and one exchange of messages. Steps and rounds count from 0.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import accumulate, pairwise
from math import ceil
from operator import itemgetter
from typing import TypeAlias

from ef21_muon.checks.settings import whole_number
from ef21_muon.layers import Batch
from ef21_muon.transport.fixed import RoundInFlight, Stages, Timer, run


class Rounds:
    """The rounds of a training, whose number of steps may change from certain steps on.

    Args:
        sync_every: the steps per round, at least 1; or a mapping from the first step of a stretch
            to its steps per round, such as {0: 120, 360: 60}. It needs an entry for step 0, and
            every stretch but the last has to consist of whole rounds.

    Attributes:
        stretches: pairs of the first step of a stretch and its steps per round, in order.
        lengths: the steps per round of each stretch.

    Raises:
        ValueError: for any other `sync_every`.

    Example:
        >>> rounds = Rounds({0: 120, 360: 60})
        >>> rounds.of(361)  # round 3 is steps 360 to 419
        (3, 1, 60)
    """

    def __init__(self, sync_every: int | Mapping[int, int]):
        stretches = dict(sync_every) if isinstance(sync_every, Mapping) else {0: sync_every}
        if not stretches or min(stretches) != 0:
            raise ValueError(
                f"sync_every={sync_every} is not allowed: give the steps of a round from step 0"
            )
        self.stretches = sorted(stretches.items())
        self.lengths = [whole_number("sync_every", length, least=1) for _, length in self.stretches]
        self._rounds = [0]  # before each stretch
        for (first, length), (then, _) in pairwise(self.stretches):
            if (then - first) % length:
                raise ValueError(
                    f"sync_every={sync_every} is not allowed: {then - first} steps from step "
                    f"{first} on are no whole rounds of {length}, give a multiple"
                )
            self._rounds.append(self._rounds[-1] + (then - first) // length)

    def of(self, step: int) -> tuple[int, int, int]:
        """The round of a step, the step's place in that round, and the number of its steps."""
        stretch = bisect_right(self.stretches, step, key=itemgetter(0)) - 1
        first, length = self.stretches[stretch]
        rounds, place = divmod(step - first, length)
        return self._rounds[stretch] + rounds, place, length

    def __str__(self) -> str:
        (_, first), *later = self.stretches
        changes = (f"{length} from step {step + 1}" for step, length in later)
        return ", ".join([str(first), *changes])


class Start(Enum):
    """Where a bucket's round begins: after a restart, with the message that was in flight."""

    WHOLE = "whole"
    TO_SERVERS = "resend to servers"
    TO_WORKERS = "resend to workers"


# Makes the stages of a bucket's round.
NewRound: TypeAlias = Callable[[Sequence[Batch], Start], Stages]


class SyncSchedule:
    """Starts and finishes the exchanges of local steps at the right steps; some are in flight.

    A bucket is a list of batches that send together. Without `streaming` all buckets send after the
    last step of a round. With it every bucket has a send step of its own, so that the bytes sent
    grow evenly over a round, as in Streaming DiLoCo. A message arrives at the servers `sync_delay`
    steps after it was sent, and the message back as many steps later; where every worker is a
    server of all layers, nothing is sent back.

    Several methods take `new_round`, which makes the stages of a bucket's round. It is asked for a
    whole round or, after a restart from a checkpoint, for one that begins with resending the
    message that was in flight.

    Args:
        buckets: the batches of each bucket.
        rounds: the steps of each round.
        sync_delay: steps, at least 0, for one direction.
        streaming: whether buckets send at different steps.

    Attributes:
        directions: 1 where nothing is sent back, else 2.

    Raises:
        ValueError: where a bucket would send again before its last message has arrived.

    References:
        Douillard et al., Streaming DiLoCo with overlapping communication, arXiv:2501.18512.
    """

    def __init__(
        self, buckets: Sequence[Sequence[Batch]], rounds: Rounds, sync_delay: int, streaming: bool
    ):
        self.buckets, self.rounds, self.sync_delay = buckets, rounds, sync_delay
        replicated = all(batch.replicated for bucket in buckets for batch in bucket)
        self.directions = 1 if replicated else 2
        shortest = min(rounds.lengths)
        if self.directions * sync_delay >= shortest:
            raise ValueError(
                f"sync_delay={sync_delay} is not allowed with sync_every={rounds}: a message has "
                "to arrive before the next one is sent, give at most "
                f"{(shortest - 1) // self.directions}"
            )
        sizes = [sum(len(b.params) * b.up.size for b in bucket) for bucket in buckets]
        sent = list(accumulate(sizes))
        self._send_steps = {
            length: [ceil(length * one / sent[-1]) - 1 if streaming else length - 1 for one in sent]
            for length in rounds.lengths
        }
        self._in_flight: dict[int, RoundInFlight] = {}
        self._flushed = -1  # the last step at which everything sent so far was made to arrive

    def after_step(self, step: int, new_round: NewRound, timer: Timer) -> None:
        """Send the messages that are due after a step, and receive those that arrive with it."""
        for bucket in self.due(step):
            self._in_flight[bucket] = RoundInFlight(
                new_round(self.buckets[bucket], Start.WHOLE), timer
            )
        self._receive(step, step, new_round, timer)

    def flush(self, step: int, new_round: NewRound, timer: Timer) -> None:
        """After the last step: receive what is in flight, and send what has not been sent since."""
        for later in range(step + 1, step + 1 + self.directions * self.sync_delay):
            self._receive(later, step, new_round, timer)
        just_sent = self.due(step)
        left = [bucket for number, bucket in enumerate(self.buckets) if number not in just_sent]
        run((new_round(bucket, Start.WHOLE) for bucket in left), timer)
        self._flushed = step

    def _receive(self, step: int, last: int, new_round: NewRound, timer: Timer) -> None:
        """Receive what arrives with a step, of all that was sent up to step `last`."""
        back = step - self.directions * self.sync_delay
        for resend, sent in (
            (Start.TO_SERVERS, step - self.sync_delay),
            (Start.TO_WORKERS, back),
        ):
            for bucket in self.due(sent) if self._flushed < sent <= last else ():
                one = self._in_flight.pop(bucket, None)
                if one is None:  # the training was restarted since
                    one = RoundInFlight(new_round(self.buckets[bucket], resend), timer)
                if one.advance():  # in a fleet this may discard all that is in flight
                    self._in_flight[bucket] = one

    def due(self, step: int) -> list[int]:
        """The numbers of the buckets that send after a step."""
        if step < 0:
            return []
        _, place, length = self.rounds.of(step)
        return [bucket for bucket, sends in enumerate(self._send_steps[length]) if sends == place]

    def undelivered(self, steps: int) -> list[Batch]:
        """The batches whose messages have not arrived at the servers after so many steps."""
        sent = range(max(steps - self.sync_delay, self._flushed + 1), steps)
        buckets = {bucket for step in sent for bucket in self.due(step)}
        return [batch for bucket in buckets for batch in self.buckets[bucket]]

    def unsent(self, steps: int) -> int:
        """How many of the last steps W does not contain, after so many steps."""
        if self._flushed == steps - 1:
            return 0
        place = self.rounds.of(steps)[1]
        in_flight = self.rounds.of(steps - place - 1)[2] if self._in_flight else 0
        return place + in_flight

    def discard(self) -> None:
        """Drop what is in flight, once it has arrived: else the next messages would be mixed up."""
        for one in self._in_flight.values():
            if one.wait:
                one.wait()
        self._in_flight, self._flushed = {}, -1

    def __getstate__(self) -> dict:
        """Without what is in flight, which a copy sends again."""
        return vars(self) | {"_in_flight": {}}
