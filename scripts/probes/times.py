"""Seconds to the target over slow and far links: what network.py measured, beside the study's."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from scripts.shakespeare.results import Results

UNLIMITED = "no limit, no delay"
LINKS = {"10mbit": "10 Mbit/s", "100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s", UNLIMITED: UNLIMITED}
CLOSE = 1.05  # times the steps without a network, what was aimed at over the slowest link
ENOUGH = 3  # repeats that this takes of a setting


@dataclass(frozen=True)
class LinkTime:
    """Of a setting over a link: the seconds to the target, by the median of its steps' seconds.

    over: of every repeat, its seconds over those without a network, measured next.
    """

    seconds: float
    over: list[float]

    @property
    def text(self) -> str:
        repeats = len(self.over)
        ratio = f" ({median(self.over):.2f}x of {repeats})" if repeats else ""
        return f"{self.seconds:,.0f}{ratio}"

    @property
    def is_close(self) -> bool:
        """Whether enough repeats say that the link costs little."""
        return len(self.over) >= ENOUGH and median(self.over) <= CLOSE


Times = dict[str, dict[str, LinkTime]]  # by setting and link


def times(results: Results, measured: Iterable[dict]) -> Times:
    """Of the settings that reach the target."""
    steps: dict[tuple[str, str], list[float]] = {}
    over: dict[tuple[str, str], list[float]] = {}
    waiting: dict[str, dict[str, float]] = {}  # for the next time without a network, by setting
    for record in measured:
        name, rate, seconds = record["name"], record["rate"], record["seconds"]
        steps.setdefault((name, rate), []).append(seconds)
        if rate != UNLIMITED:
            waiting.setdefault(name, {})[rate] = seconds
            continue
        for slow, longer in waiting.pop(name, {}).items():
            over.setdefault((name, slow), []).append(longer / seconds)
    found: Times = {}
    for (name, rate), seconds in steps.items():
        one = results.get(name)
        if one and (tokens := one.to_target("tokens")):
            needed = tokens * one.last["step"] / one.last["tokens"]
            time = LinkTime(needed * median(seconds), over.get((name, rate), []))
            found.setdefault(name, {})[rate] = time
    return found
