"""Which workers may meet, as all of them find alike: same run, own number, within reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ef21_muon.identity import differences
from ef21_muon.transport.reach import INTERFACE, Place, cut_off

FEW = 6  # differences, at most, that an error names


class FleetError(ConnectionError):
    """The other workers are out of reach. One line: what is so, and what to do."""


class FleetRefused(FleetError):
    """This worker cannot be among the others, and to start it again would not mend that."""


@dataclass(frozen=True)
class Card:
    """What a worker says of itself to those that it has not met before."""

    worker: int  # its number
    process: int  # its id
    since: float  # when it started, in seconds
    met: bool  # whether it has had a round
    built: Mapping[str, str]  # what has to be the same on all, by name
    place: Place

    @property
    def order(self) -> tuple:
        """Those that have had a round come first, then those that started first."""
        return not self.met, self.since, self.worker, self.place.host, self.process

    def __str__(self) -> str:
        return f"worker {self.worker} on {self.place.host} (process {self.process})"


def differing_from(theirs: Mapping[str, str], mine: Mapping[str, str]) -> str:
    """What differs here from what the others have, in words; empty if nothing does."""
    return differences(mine, theirs, "{key}={mine} (theirs {theirs})", FEW)


def refusals(cards: Sequence[Card]) -> dict[int, str]:
    """Of the workers that cannot be among these the reason, by place in the list.

    The run that goes on is that of most workers that have had a round, then of most workers; of
    those with one number the first in order; and where some workers are out of the others' reach,
    those that have had a round.
    """
    runs = [[one for one in cards if one.built == card.built] for card in cards]
    run = min(runs, key=lambda run: (-sum(one.met for one in run), -len(run), _first(run).order))
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
    if not any(cards[place].met for place in behind):
        return reasons
    return dict.fromkeys((p for p, card in enumerate(cards) if not card.met), reasons[behind[0]])
