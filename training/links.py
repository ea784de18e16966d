"""Links between workers, and the link of a dry run."""

import math
from dataclasses import dataclass

from omegaconf import DictConfig

from training.workers import RunError

LINKS = {  # bits per second, each way
    "10 Mbit/s": 1e7,
    "100 Mbit/s": 1e8,
    "1 Gbit/s": 1e9,
    "10 Gbit/s": 1e10,
    "100 Gbit/s": 1e11,
}


@dataclass
class Plan:
    """`plan` of configs/config.yaml: the seconds of a step, and the link between workers."""

    step_seconds: float | None
    mbit: float | None
    latency_ms: float


def check_plan(own: DictConfig, dry_run: bool) -> None:
    """Raise RunError for values out of range, for incomplete ones, and without dry_run."""
    for key in ("step_seconds", "mbit"):
        value = own[key]
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise RunError(f"plan.{key}={value:g} is not allowed: give a number above 0")
    if not (own.latency_ms >= 0 and math.isfinite(own.latency_ms)):
        raise RunError(
            f"plan.latency_ms={own.latency_ms:g} is not allowed: give a number of at least 0"
        )
    given = [f"plan.{key}={own[key]:g}" for key in own if own[key]]
    lacking = [f"plan.{key}" for key in ("step_seconds", "mbit") if own[key] is None]
    if given and lacking:
        raise RunError(
            f"{' '.join(given)} needs {' and '.join(lacking)}: give a step's seconds and the "
            "link's rate, or neither"
        )
    if given and not dry_run:
        raise RunError(f"{' '.join(given)} needs dry_run=true: add it, or leave these out")
