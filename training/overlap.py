"""Which settings of the study hide their messages behind the computation, for a model and a link.

With local steps and `optimizer.sync_delay=D` a message travels for D steps, each way, while the
training continues. It is hidden if it takes no longer than D steps. D has to be less than the steps
of a round, or than half of them if servers send messages back. Otherwise the training waits.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from omegaconf import DictConfig

from model import GPT
from training.config import build, compose
from training.links import LINKS
from training.method import longer_than
from training.report import table
from training.study import MAP, SUMMARY, WORKERS, Setting
from training.traffic import groups_of, loads_by_placement, rounds_of_method

NOT_RUN = "not run"
NO_SUMMARY = (
    "The study's settings are left out: results/shakespeare/summary.json is missing; "
    "python scripts/shakespeare/figures.py writes it."
)
NOTE = """\
The settings of the study, for this model. Messages are hidden if they travel while the training
continues: with local steps and optimizer.sync_delay=D they have D steps, each way. The table has
the seconds that a step has to compute for that, at the longest delay that a round allows. Without
a delay the training waits for a round, as it always does with one round per step: "waits" is these
seconds per step; some of them pass while other messages are encoded. The loss gap compares with as
many workers without compression (results/README.md: 0.8 M parameters, 600 steps, no delay)."""


@dataclass(frozen=True)
class Exchange:
    """A round of a setting on so many workers: its fewest steps, and the max traffic per rank.

    size: the bytes sent or received, whichever is more; ways: 2 if servers send something back.
    """

    setting: Setting
    workers: int
    steps: int
    size: int
    ways: int

    @property
    def longest_delay(self) -> int:
        """The longest delay in steps, each way; 0 if the training waits for every message."""
        return (self.steps - 1) // self.ways

    @property
    def seen(self) -> int | None:
        """The most workers up to these with which the setting has run."""
        return max((n for n in self.setting.over if n <= self.workers), default=None)

    @property
    def over(self) -> str:
        """The loss gap in the study."""
        over = self.setting.over.get(self.workers)
        return NOT_RUN if over is None else f"{over:+.1f} %"

    def seconds(self, rate: float, latency: float = 0.0) -> float:
        """The seconds of a round without a delay.

        rate: bits per second. latency: seconds, one way.
        """
        return 8 * self.size / rate + self.ways * latency

    def delay(self, step: float, rate: float, latency: float) -> int | None:
        """The shortest delay that hides the round behind steps of `step` seconds; None if none is.

        Each way is taken to carry all the bytes.
        """
        one_way = 8 * self.size / rate + latency
        if one_way > self.longest_delay * step:
            return None
        return min(math.ceil(one_way / step), self.longest_delay)


def overlap(config: DictConfig, model: GPT) -> list[str]:
    """The study's map for this model, and which settings are hidden under `plan`, as paragraphs.

    The model may be on the meta device. Only the configuration's model, length of the run, schedule
    and `plan` matter: settings have their own optimizer, norms and compressors. Settings whose
    rounds are longer than the run are left out. Without the study's summary there is no map.
    """
    if not SUMMARY.exists():
        return [NO_SUMMARY]
    exchanges = list(_exchanges(config, model))
    parts = [NOTE, _shortest_steps(exchanges)]
    if config.plan.step_seconds is not None:
        parts += _at_this_link(config, exchanges)
    return parts


def _exchanges(config: DictConfig, model: GPT) -> Iterator[Exchange]:
    of_settings = []
    for setting in MAP:
        own = _composed(setting.overrides(config))
        method = build(own.optimizer, "optimizer", _partial_=True)
        if longer_than(rounds_of_method(method), config.steps):
            continue
        of_settings.append((setting, method, groups_of(own, model)))
    for workers in WORKERS:
        for setting, method, groups in of_settings:
            server, load = next(iter(loads_by_placement(method, groups, workers).items()))
            steps = min(rounds_of_method(method).lengths)
            yield Exchange(
                setting, workers, steps, load.max_traffic, 1 if server == "replicated" else 2
            )


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    return compose(overrides).config


def _shortest_steps(exchanges: list[Exchange]) -> str:
    heading = ["workers", "setting of the study", "loss gap", "bytes per round"]
    rows = [[*heading, *LINKS]]
    for one in exchanges:
        seconds = map(one.seconds, LINKS.values())
        if one.longest_delay:
            cells = [f"{each / one.longest_delay:.3g}" for each in seconds]
        else:
            cells = [f"waits {each / one.steps:.3g}" for each in seconds]
        rows.append([*_first_cells(one), f"{one.size:,}", *cells])
    return table(rows)


def _first_cells(one: Exchange) -> list[str]:
    return [str(one.workers), one.setting.words, one.over]


def _at_this_link(config: DictConfig, exchanges: list[Exchange]) -> list[str]:
    plan = config.plan
    step, link = plan.step_seconds, (1e6 * plan.mbit, plan.latency_ms / 1000)
    delays = [(one, one.delay(step, *link)) for one in exchanges]
    rows = [["workers", "setting of the study", "loss gap", "s per round", "waits", "hidden with"]]
    for one, delay in delays:
        seconds = one.seconds(*link)
        rows.append(
            [
                *_first_cells(one),
                f"{seconds:.3g}",
                f"{seconds / (seconds + one.steps * step):.1%}",
                "nothing" if delay is None else f"optimizer.sync_delay={delay}",
            ]
        )
    return [
        f"With {step:g} s of computation per step, {plan.mbit:g} Mbit/s and {plan.latency_ms:g} ms "
        'one way; "waits" is the share of the time without a delay.',
        table(rows),
        "The hidden setting with the lowest loss in the study. These overrides replace those of "
        "optimizer, norm and compressors:",
        *(_answer(config, workers, delays) for workers in WORKERS),
    ]


def _answer(config: DictConfig, workers: int, delays: list[tuple[Exchange, int | None]]) -> str:
    """The hidden setting of lowest loss with as many workers, or with the next fewer that ran."""
    hidden = [(one, d) for one, d in delays if one.workers == workers and d is not None]
    if not hidden:
        return f"{workers} workers: none, the steps are too short for this link"
    run = [(one, delay) for one, delay in hidden if one.seen]
    one, delay = min(run, key=lambda pair: pair[0].setting.over[pair[0].seen])
    seen = one.seen
    gap = f"{one.setting.over[seen]:+.1f} %"
    gap += "" if seen == workers else f" with {seen} workers, {NOT_RUN} with {workers}"
    overrides = shlex.join([*one.setting.overrides(config), f"optimizer.sync_delay={delay}"])
    return f"{workers} workers: {one.setting.words} ({gap}):\n{overrides}"
