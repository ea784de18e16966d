"""All runs of the study: every setting with each of its seeds."""

from dataclasses import dataclass

from scripts.shakespeare.conditions import (
    GENRE_SETTINGS,
    GPU_SETTINGS,
    SIZE_SETTINGS,
    WORKER_SETTINGS,
)
from scripts.shakespeare.settings import (
    FEEDBACK_SETTINGS,
    MOMENTUM_SETTINGS,
    SEEDS,
    SETTINGS,
    SIGN_SETTINGS,
)


@dataclass(frozen=True)
class StudyRun:
    """A run: the name of its log below results/shakespeare, and what it overrides."""

    name: str
    overrides: tuple[str, ...]
    workers: int = 2
    device: str = "cpu"


ALL_SETTINGS = [
    *(*SETTINGS, *MOMENTUM_SETTINGS, *FEEDBACK_SETTINGS, *SIGN_SETTINGS),
    *(*WORKER_SETTINGS, *GPU_SETTINGS, *SIZE_SETTINGS, *GENRE_SETTINGS),
]
RUNS = [
    StudyRun(f"{one.name}-seed{seed}", (*one.overrides, f"seed={seed}"), one.workers, one.device)
    for seed in SEEDS
    for one in ALL_SETTINGS
    if seed in one.seeds
]
