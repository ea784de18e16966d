"""When messages are sent and arrive, where a round has many steps."""

from collections import defaultdict
from collections.abc import Iterable
from functools import reduce
from itertools import accumulate, chain
from math import ceil
from operator import add

from ef21_muon.exchange.collectives import Traffic
from ef21_muon.exchange.lanes import Lanes
from ef21_muon.exchange.phases import Phase, current
from ef21_muon.exchange.rounds import Rounds


class Timetable:
    """The turns of buckets in rounds, and what has arrived after `delay` steps.

    Steps count from 0. Without `stagger` all buckets have their turn in the last step of a round;
    with it every bucket has its own, so that the bytes that were sent grow evenly. A message takes
    `delay` steps from the turn of its bucket to the servers, and as many back, but where nothing is
    sent back. Bytes are of this rank, and with `sum_over` of the whole worker.
    """

    _lanes: Lanes | None = None

    def __init__(self, phases: list[Phase], rounds: Rounds, delay: int, stagger: bool):
        self.phases, self.rounds, self.delay = phases, rounds, delay
        self.ways = 1 if phases[0].exchange.replicated else 2
        shortest = min(rounds.lengths)
        if self.ways * delay >= shortest:
            raise ValueError(
                f"delay={delay} is not allowed with every={rounds}: what is under way has to arrive"
                f" before the next message, give at most {(shortest - 1) // self.ways}"
            )
        # By phase, steps of the round and place in it, where buckets have their turn.
        self._due: dict[tuple[int, int, int], list[range]] = defaultdict(list)
        for length in set(rounds.lengths):
            spread = _spread(phases[0], length) if stagger else None
            for phase in phases:
                turns = spread or [length - 1] * len(phase.buckets)
                for bucket, turn in zip(phase.buckets, turns, strict=True):
                    self._due[phase.start, length, turn].append(bucket)
        exchanges = {phase.start: phase.exchange for phase in phases}
        self._up, self._down = (
            {key: _total(map(getattr(exchanges[key[0]], of), b)) for key, b in self._due.items()}
            for of in ("traffic_to_servers", "traffic_to_workers")
        )

    def sum_over(self, lanes: Lanes) -> None:
        """Count what all ranks of the worker send, on all of them together."""
        self._lanes = lanes
        lengths = sorted(set(self.rounds.lengths))
        places = [
            (phase.start, length, place)
            for phase in self.phases
            for length in lengths
            for place in range(length)
        ]
        for table in (self._up, self._down):
            of_rank = [table.get(place, Traffic()) for place in places]
            table.update(zip(places, of_worker(of_rank, lanes), strict=True))

    def departing(self, step: int) -> tuple[Phase, list[range]]:
        """The buckets whose turn a step is."""
        round, place, length = self.rounds.of(step)
        phase = current(self.phases, round)
        return phase, self._due.get((phase.start, length, place), [])

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
        of_rank = _total(
            of(bucket)
            for of in (exchange.traffic_to_servers, exchange.traffic_to_workers)
            for bucket in buckets
        )
        return of_worker([of_rank], self._lanes)[0] if self._lanes else of_rank

    def _of(self, table: dict, step: int) -> Traffic:
        if step < 0:
            return Traffic()
        round, place, length = self.rounds.of(step)
        return table.get((current(self.phases, round).start, length, place), Traffic())


def _spread(phase: Phase, length: int) -> list[int]:
    """The turn of every bucket: when its bytes, and those of the ones before it, are due."""
    sizes = [phase.exchange.traffic_to_servers(bucket).w2s_bytes for bucket in phase.buckets]
    return [ceil(length * sent / sum(sizes)) - 1 for sent in accumulate(sizes)]


def _total(traffic: Iterable[Traffic]) -> Traffic:
    return reduce(add, traffic, Traffic())


def of_worker(traffic: list[Traffic], lanes: Lanes) -> list[Traffic]:
    """Counts summed over the ranks of the worker, but what each hands to the network."""
    counts = [(one.w2s_bytes, one.s2w_bytes, one.received_bytes) for one in traffic]
    sums = lanes.total(*chain(*counts))
    return [
        Traffic(*sums[3 * place : 3 * place + 3], one.wire_tx_bytes)
        for place, one in enumerate(traffic)
    ]
