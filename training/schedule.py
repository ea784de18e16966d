"""When what happens in a run: the learning rate of a step, and what is done every so many."""

from collections import deque
from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch.optim.lr_scheduler import LambdaLR


def due(step: int, every: int) -> bool:
    """Whether a step is one of every `every`; 0 is never."""
    return every > 0 and step % every == 0


def new_scheduler(optimizer: torch.optim.Optimizer, config: DictConfig, steps: int) -> LambdaLR:
    """The schedule after `steps` steps."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group.get("initial_lr", group["lr"])
    return LambdaLR(optimizer, lambda step: lr_factor(step, config), last_epoch=steps - 1)


def lr_factor(step: int, config: DictConfig) -> float:
    """The share of the lr at `step`, counted from 0: trapezoidal."""
    warmup = config.schedule.warmup * config.steps
    cooldown = config.schedule.cooldown * config.steps
    rising = (step + 1) / warmup if step < warmup else 1.0
    falling = (config.steps - step) / cooldown if config.steps - step < cooldown else 1.0
    return min(1.0, rising, falling)


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
