"""Trainings of the study in one process, and the gradients that a worker has in them."""

from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

from data.loader import WorkerBatches
from model import GPT
from scripts.shakespeare.runs import SETTINGS
from training.config import build, compose
from training.data import open_data
from training.method import build_optimizer

WORKERS = 2
LAYERS = (  # whose gradients are kept
    "blocks.1.attention.query.weight",
    "blocks.2.attention.value.weight",
    "blocks.1.mlp.expand.weight",
    "blocks.2.mlp.project.weight",
)
ROUNDS = 200  # all before the cooldown, at the full step
EVERY = 5  # rounds between two that are measured


def config_of(name: str) -> DictConfig:
    """The configuration of a setting of the study."""
    return compose(("experiment=shakespeare", *SETTINGS[name].overrides.split())).config


def training_of(
    config: DictConfig, count: int = WORKERS
) -> tuple[GPT, Optimizer, list[WorkerBatches]]:
    """Of all workers in one process: the model, its optimizer, and what each worker reads."""
    model = GPT(build(config.model, "model"), config.seed)
    tokens, _ = open_data(config)
    workers = [
        WorkerBatches(tokens, config.model.context, rank, count, config.seed)
        for rank in range(count)
    ]
    return model, build_optimizer(config, model), workers


def train(
    config: DictConfig, model: GPT, optimizer: Optimizer, workers: list[WorkerBatches], steps: int
) -> Iterator[None]:
    """Steps on the mean gradient; gives way when the first worker's share of it is there."""
    count = len(workers)
    for _ in range(steps):
        for rank, windows in enumerate(workers):
            loss = model(*windows.next(config.batch.global_size // count))
            (loss / count).backward()
            if rank == 0:
                yield
        optimizer.step()
        optimizer.zero_grad()


def worker_gradients(
    config: DictConfig, rounds: int, count: int = WORKERS
) -> dict[str, list[Tensor]]:
    """The first worker's gradients of LAYERS, each (m, n), in every round of a training."""
    model, optimizer, workers = training_of(config, count)
    layers = {name: p for name, p in model.named_parameters() if name in LAYERS}
    gradients: dict[str, list[Tensor]] = {name: [] for name in layers}
    for _ in train(config, model, optimizer, workers, rounds):
        for name, layer in layers.items():
            gradients[name].append(count * layer.grad)
    return gradients


def is_measured(done: int, rounds: int) -> bool:
    """Whether a replay measures after so many rounds: one of EVERY in the second half."""
    return done > rounds // 2 and done % EVERY == 0


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()
