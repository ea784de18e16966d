"""The schedule of a run: the learning rate of each step, and which steps an interval falls on."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import cos, pi

import torch
from omegaconf import DictConfig
from torch.optim.lr_scheduler import LambdaLR

from training.workers import RunError

SHAPES = ("trapezoid", "cosine")


@dataclass
class Schedule:
    """`schedule` of configs/config.yaml: how the learning rate changes over the run."""

    shape: str
    warmup: float
    cooldown: float
    floor: float


def check_schedule(config: DictConfig, overrides: Iterable[str]) -> None:
    """Raise RunError for values out of range, and for a cooldown that has no effect."""
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
    """Whether the step is a multiple of `every`. With 0, no step is."""
    return every > 0 and step % every == 0


def new_scheduler(optimizer: torch.optim.Optimizer, config: DictConfig, steps: int) -> LambdaLR:
    """The learning rate scheduler of a run that has taken `steps` steps."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group.get("initial_lr", group["lr"])
    return LambdaLR(optimizer, lambda step: lr_factor(step, config), last_epoch=steps - 1)


def lr_factor(step: int, config: DictConfig) -> float:
    """The factor of the learning rate in a step, counted from 0."""
    own, left = config.schedule, max(0, config.steps - step)
    warmup, fall = own.warmup * config.steps, cooldown_steps(config)
    rising = (step + 1) / warmup if step < warmup else 1.0
    falling = left / fall if left < fall else 1.0
    if own.shape == "cosine":
        falling = (1 - cos(pi * falling)) / 2
    return min(1.0, rising, own.floor + (1 - own.floor) * falling)


def cooldown_steps(config: DictConfig) -> float:
    """The number of steps, at the end, in which the learning rate falls."""
    own = config.schedule
    share = own.cooldown if own.shape == "trapezoid" else 1 - own.warmup
    return share * config.steps
