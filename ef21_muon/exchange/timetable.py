"""When messages are sent and arrive, where a round has many steps."""

from collections.abc import Iterable
from functools import reduce
from itertools import accumulate
from math import ceil
from operator import add

from ef21_muon.exchange.collectives import Traffic
from ef21_muon.exchange.lanes import Lanes
from ef21_muon.exchange.phases import Phase, current


class Timetable:
    """The turns of buckets in rounds of `every` steps, and what has arrived after `delay` of them.

    Steps count from 0. Without `stagger` all buckets have their turn in the last step of a round;
    with it every bucket has its own, so that the bytes that were sent grow evenly. A message takes
    `delay` steps from the turn of its bucket to the servers, and as many back, but where nothing is
    sent back. Bytes are of the whole worker, whose ranks are `lanes`.
    """

    def __init__(
        self, phases: list[Phase], every: int, delay: int, stagger: bool, lanes: Lanes | None
    ):
        self.phases, self.every, self.delay, self._lanes = phases, every, delay, lanes
        self.ways = 1 if phases[0].exchange.replicated else 2
        if self.ways * delay >= every:
            raise ValueError(
                f"delay={delay} is not allowed with every={every}: what is under way has to arrive "
                f"before the next message, give at most {(every - 1) // self.ways}"
            )
        self._turns = _spread(phases[0], every) if stagger else None
        self._up, self._down = {}, {}  # by phase and place in the round
        for phase in phases:
            for place in range(every):
                buckets, exchange = self._buckets(phase, place), phase.exchange
                key = phase.start, place
                self._up[key] = _total(map(exchange.traffic_to_servers, buckets), lanes)
                self._down[key] = _total(map(exchange.traffic_to_workers, buckets), lanes)

    def departing(self, step: int) -> tuple[Phase, list[range]]:
        """The buckets whose turn a step is."""
        phase = current(self.phases, step // self.every)
        return phase, self._buckets(phase, step % self.every)

    def arriving(self, step: int, ways: int) -> tuple[Phase, list[range]]:
        """The buckets whose messages arrive with a step, after one way or two."""
        sent = step - ways * self.delay
        return self.departing(sent) if sent >= 0 else (self.phases[0], [])

    def under_way(self, steps: int) -> set[int]:
        """The batches whose messages have not come to the servers after as many steps."""
        later = range(steps, steps + self.delay)
        return {b for step in later for bucket in self.arriving(step, 1)[1] for b in bucket}

    def sent(self, step: int) -> Traffic:
        """What messages to the servers take that leave with a step."""
        return self._of(self._up, step)

    def returned(self, step: int) -> Traffic:
        """What messages back take that leave with a step."""
        return self._of(self._down, step - self.delay)

    def taken(self, phase: Phase, buckets: list[range]) -> Traffic:
        """What these buckets take both ways."""
        exchange = phase.exchange
        up, down = (
            _total(map(of, buckets), self._lanes)
            for of in (exchange.traffic_to_servers, exchange.traffic_to_workers)
        )
        return up + down

    def _of(self, table: dict, step: int) -> Traffic:
        if step < 0:
            return Traffic()
        return table[current(self.phases, step // self.every).start, step % self.every]

    def _buckets(self, phase: Phase, place: int) -> list[range]:
        turns = self._turns or [self.every - 1] * len(phase.buckets)
        return [b for b, turn in zip(phase.buckets, turns, strict=True) if turn == place]


def _spread(phase: Phase, every: int) -> list[int]:
    """The turn of every bucket: when its bytes, and those of the ones before it, are due."""
    sizes = [phase.exchange.traffic_to_servers(bucket).w2s_bytes for bucket in phase.buckets]
    return [ceil(every * sent / sum(sizes)) - 1 for sent in accumulate(sizes)]


def _total(traffic: Iterable[Traffic], lanes: Lanes | None) -> Traffic:
    of_rank = reduce(add, traffic, Traffic())
    if lanes is None:
        return of_rank
    w2s_bytes, s2w_bytes = lanes.total(of_rank.w2s_bytes, of_rank.s2w_bytes)
    return Traffic(w2s_bytes, s2w_bytes, of_rank.wire_tx_bytes)
