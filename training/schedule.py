"""When what happens in a run: the learning rate of a step, and what is done every so many."""

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
