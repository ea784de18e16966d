"""Why rare rounds cost little: what workers' local steps have in common.

The uncompressed run of the study is trained in one process up to its cooldown. From there two
workers train by themselves, each on its own part of the text, for a round that is not measured, are
averaged, and train for another: of its differences D_j = W - x_j, layer by layer and for several
numbers of steps, are measured

    cosine       of D_1 and D_2: 1 where both are signal, 0 where both are noise of a worker
    stable_rank  ||D_1||^2 / ||D_1||_2^2 over the smaller side: 1 where all directions are alike
    kept         the share of ||D_1||^2 in its best approximation of a tenth of the rank
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from data.loader import WorkerBatches
from scripts.probes.trainings import config_of, train, training_of

STEPS = 360  # to the cooldown
EVERY = (1, 3, 10, 30, 60)
KEPT_RANK = 0.1


def records() -> Iterator[dict]:
    """By steps per round and layer."""
    config = config_of("identity")
    model, optimizer, workers = training_of(config)
    train(config, model, optimizer, workers, STEPS)
    for every in EVERY:
        trainings = [copy.deepcopy((model, optimizer)) for _ in workers]
        models = [own for own, _ in trainings]
        train_apart(config, trainings, workers, every)
        average(models)
        shared = copy.deepcopy(models[0])
        train_apart(config, trainings, workers, every)
        for (name, layer), *of_workers in zip(
            shared.named_parameters(), *(own.parameters() for own in models), strict=True
        ):
            found = measured(*(layer.detach() - own.detach() for own in of_workers))
            yield {"every": every, "layer": name, **found}


def train_apart(
    config: DictConfig, trainings: Sequence[tuple], workers: list[WorkerBatches], steps: int
) -> None:
    """Steps of every worker by itself, with its share of a batch."""
    for (model, optimizer), windows in zip(trainings, workers, strict=True):
        train(config, model, optimizer, [windows], steps)


@torch.no_grad()
def average(models: Sequence[nn.Module]) -> None:
    """Every model becomes the mean of all."""
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        mean = torch.stack([parameter.detach() for parameter in parameters]).mean(0)
        for parameter in parameters:
            parameter.copy_(mean)


def measured(first: Tensor, second: Tensor) -> dict[str, float]:
    """Of two workers' differences in one layer, each (m, n)."""
    squares = torch.linalg.svdvals(first).square()
    rank = max(1, round(KEPT_RANK * len(squares)))
    return {
        "cosine": torch.cosine_similarity(first.flatten(), second.flatten(), 0).item(),
        "stable_rank": float(squares.sum() / squares[0] / len(squares)),
        "kept": float(squares[:rank].sum() / squares.sum()),
    }
