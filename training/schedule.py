"""When what happens in a run: the learning rate of a step, and what is done every so many."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import cos, pi

import torch
from omegaconf import DictConfig
from torch.optim.lr_scheduler import LambdaLR

from training.workers import RunError

SHAPES = ("trapezoid", "cosine")


@dataclass
class Schedule:
    """configs/config.yaml's, of the lr."""

    shape: str
    warmup: float
    cooldown: float
    floor: float


def check_schedule(config: DictConfig, overrides: Iterable[str]) -> None:
    """Raise RunError for values out of range, and for a cooldown that was asked for in vain."""
    own, steps = config.schedule, config.steps
    for key, of in (("warmup", "steps"), ("cooldown", "steps"), ("floor", "lr")):
        value = own[key]
        if not 0 <= value <= 1:
            hint = f" ({value / steps:g} for {value:g} of {steps})" if 1 < value <= steps else ""
            raise RunError(
                f"schedule.{key}={value} is not allowed: give a share of the {of}, 0 to 1"
                f"{hint if of == 'steps' else ''}"
            )
    if own.shape == "cosine" and any(
        one.lstrip("+").startswith("schedule.cooldown=") for one in overrides
    ):
        raise RunError(
            f"schedule.cooldown={own.cooldown} has no effect with schedule.shape=cosine, which "
            "falls from the end of the warm-up on: leave it out, or give schedule.shape=trapezoid"
        )


def due(step: int, every: int) -> bool:
    """Whether a step is one of every `every`; 0 is never."""
    return every > 0 and step % every == 0


def new_scheduler(optimizer: torch.optim.Optimizer, config: DictConfig, steps: int) -> LambdaLR:
    """The schedule after `steps` steps."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group.get("initial_lr", group["lr"])
    return LambdaLR(optimizer, lambda step: lr_factor(step, config), last_epoch=steps - 1)


def lr_factor(step: int, config: DictConfig) -> float:
    """The share of the lr at `step`, counted from 0."""
    own, left = config.schedule, max(0, config.steps - step)
    warmup, fall = own.warmup * config.steps, steps_of_fall(config)
    rising = (step + 1) / warmup if step < warmup else 1.0
    falling = left / fall if left < fall else 1.0
    if own.shape == "cosine":
        falling = (1 - cos(pi * falling)) / 2
    return min(1.0, rising, own.floor + (1 - own.floor) * falling)


def steps_of_fall(config: DictConfig) -> float:
    """The steps at the end in which the lr falls."""
    own = config.schedule
    share = own.cooldown if own.shape == "trapezoid" else 1 - own.warmup
    return share * config.steps


class Later:
    """Actions on what is on its way between workers, each some `steps` after it left."""

    def __init__(self, steps: int):
        self.steps = steps
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def add(self, step: int, action: Callable[[], None]) -> None:
        """For what has left with a step."""
        self._waiting.append((step + self.steps, action))

    def settle(self, step: float) -> None:
        """Take the actions that are due at a step."""
        while self._waiting and self._waiting[0][0] <= step:
            _, action = self._waiting.popleft()
            action()
