"""Trainings of the study with all their workers in one process, for probes to look into."""

from collections.abc import Callable

from omegaconf import DictConfig
from torch.optim import Optimizer

from data.loader import WorkerBatches
from model import GPT
from scripts.shakespeare.runs import SETTINGS
from training.config import build, compose
from training.data import open_data
from training.method import build_optimizer

WORKERS = 2


def config_of(name: str) -> DictConfig:
    """The configuration of a setting of the study."""
    return compose(("experiment=shakespeare", *SETTINGS[name].overrides.split())).config


def training_of(config: DictConfig) -> tuple[GPT, Optimizer, list[WorkerBatches]]:
    """The model, its optimizer, and what each worker reads."""
    model = GPT(build(config.model, "model"), config.seed)
    tokens, _ = open_data(config)
    workers = [
        WorkerBatches(tokens, config.model.context, rank, WORKERS, config.seed)
        for rank in range(WORKERS)
    ]
    return model, build_optimizer(config, model), workers


def train(
    config: DictConfig,
    model: GPT,
    optimizer: Optimizer,
    workers: list[WorkerBatches],
    steps: int,
    see: Callable[[], object] = lambda: None,
) -> None:
    """Steps on the workers' mean gradient; `see` when the first one's share of it is there."""
    for _ in range(steps):
        for rank, windows in enumerate(workers):
            loss = model(*windows.next(config.batch.global_size // WORKERS))
            (loss / len(workers)).backward()
            if rank == 0:
                see()
        optimizer.step()
        optimizer.zero_grad()
