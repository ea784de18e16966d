"""Which workers may be in a fleet: those of one run, with numbers of their own, within reach.

All workers reach the same result, since all apply these rules to the same cards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ef21_muon.checks.identity import differences
from ef21_muon.transport.reach import INTERFACE, Place, cut_off

FEW = 6  # differences, at most, that an error names


class FleetError(ConnectionError):
    """The other workers cannot be reached. Its text is one line: the cause, and what to do."""


class FleetRefused(FleetError):
    """This worker cannot be among the others, and starting it again would not help."""


@dataclass(frozen=True)
class Card:
    """What a worker sends of itself to workers that it exchanges messages with for the first time.

    Attributes:
        worker: its number.
        process: the id of its process.
        since: when it started, in seconds since the epoch.
        has_synced: whether it has taken part in a round.
        built: by name the settings that have to be the same on all workers.
        place: where it is in the network.
    """

    worker: int
    process: int
    since: float
    has_synced: bool
    built: Mapping[str, str]
    place: Place

    @property
    def order(self) -> tuple:
        """A sort key: workers that have had a round come first, then those that started first."""
        return not self.has_synced, self.since, self.worker, self.place.host, self.process

    def __str__(self) -> str:
        return f"worker {self.worker} on {self.place.host} (process {self.process})"


def differing_from(theirs: Mapping[str, str], mine: Mapping[str, str]) -> str:
    """The settings that differ from those of the others, in words; empty if none does."""
    return differences(mine, theirs, "{key}={mine} (theirs {theirs})", FEW)


def refusals(cards: Sequence[Card]) -> dict[int, str]:
    """Find the workers that cannot be in the fleet.

    If workers of several runs are there, the run of most workers that have had a round stays, then
    that of most workers. If several workers have one number, the first in the order of cards stays.
    If some workers are out of the others' reach, those stay that have had a round.

    Args:
        cards: of all workers that are there.

    Returns:
        The reasons, by the worker's index in `cards`.
    """
    runs = [[one for one in cards if one.built == card.built] for card in cards]
    run = min(
        runs, key=lambda run: (-sum(one.has_synced for one in run), -len(run), _first(run).order)
    )
    found = {}
    for place, card in enumerate(cards):
        owner = _first([one for one in run if one.worker == card.worker] or run)
        if differing := differing_from(run[0].built, card.built):
            found[place] = (
                f"another run is at this lighthouse, with {_first(run)}: {differing}: start all "
                "workers alike, or give this run a lighthouse of its own"
            )
        elif owner is not card:
            found[place] = (
                f"there is {owner} already: give this one another number, or this run a lighthouse "
                "of its own, or end that process"
            )
    return found or _out_of_reach(cards)


def _first(cards: Sequence[Card]) -> Card:
    return min(cards, key=lambda card: card.order)


def _out_of_reach(cards: Sequence[Card]) -> dict[int, str]:
    behind = cut_off([card.place for card in cards])
    reasons = {
        place: f"{cards[place]} would listen at {cards[place].place.address}, which is no address "
        "for other machines: give the one by which they reach it as its host (membership.host), or "
        f"set {INTERFACE} there to the network interface that they reach"
        for place in behind
    }
    if not any(cards[place].has_synced for place in behind):
        return reasons
    return dict.fromkeys(
        (p for p, card in enumerate(cards) if not card.has_synced), reasons[behind[0]]
    )
