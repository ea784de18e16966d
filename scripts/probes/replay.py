"""Why compression costs loss: one worker's gradients, sent by every compressor of the study.

The uncompressed run is trained in one process, and the gradients that its first worker has of a few
layers are kept. Every compressor then sends them, M_j - G_j round after round as in Algorithm 1 of
arXiv:2510.00643. Measured are, as means over rounds and layers,

    error      ||G_j - M_j|| / ||M_j||
    alignment  <U V^T of G_j, U V^T of M_j> / min(m, n): 1 where the steps of the spectral norm,
               which the LMO makes of them, are the same

Gradients are the same for all: what compression does to the path of the model is left out.
"""

from collections.abc import Iterator, Sequence
from statistics import mean

import torch
from omegaconf import DictConfig
from torch import Tensor

from ef21_muon import EF21Muon
from ef21_muon.compressors.base import Compressor
from scripts.probes.trainings import WORKERS, config_of, train, training_of
from scripts.shakespeare.results import LOCAL, OTHERS
from scripts.shakespeare.runs import SERVER, SETTINGS
from training.config import build

LAYERS = (  # whose gradients are kept
    "blocks.1.attention.query.weight",
    "blocks.2.attention.value.weight",
    "blocks.1.mlp.expand.weight",
    "blocks.2.mlp.project.weight",
)
ROUNDS = 200  # all before the cooldown, at the full step
EVERY = 5  # rounds between two that are measured, in the second half
NOT_REPLAYED = ("feedback", "both ways", "embedding apart", SERVER, LOCAL, *OTHERS)


def records() -> Iterator[dict]:
    """By setting."""
    gradients = worker_gradients(config_of("identity"), ROUNDS)
    for name, setting in SETTINGS.items():
        if "/" in name or setting.family in NOT_REPLAYED:
            continue
        config = config_of(name)
        w2s, momentum = build(config.w2s, "w2s"), config.optimizer.momentum
        measured = [replay(of_layer, w2s, momentum) for of_layer in gradients.values()]
        error, alignment = (mean(values) for values in zip(*measured, strict=True))
        yield {"name": name, "error": error, "alignment": alignment}


def worker_gradients(config: DictConfig, rounds: int) -> dict[str, list[Tensor]]:
    """The first worker's gradients of LAYERS, each (m, n), in every round of a training."""
    model, optimizer, workers = training_of(config)
    gradients: dict[str, list[Tensor]] = {name: [] for name in LAYERS}

    def keep() -> None:
        for name, of_layer in gradients.items():
            of_layer.append(WORKERS * model.get_parameter(name).grad)

    train(config, model, optimizer, workers, rounds, see=keep)
    return gradients


def replay(gradients: Sequence[Tensor], w2s: Compressor, momentum: float) -> tuple[float, float]:
    """Send one layer's gradients: mean error of the estimator, and mean alignment."""
    layer = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = EF21Muon([layer], lr=0.0, w2s=w2s, momentum=momentum, seed=0)
    errors, alignments = [], []
    for done, gradient in enumerate(gradients, 1):
        layer.grad = gradient
        optimizer.step()
        if done > len(gradients) // 2 and done % EVERY == 0:
            state = optimizer.state[layer]
            estimate, wanted = state["gradient_estimate"], state["momentum"]
            errors.append(float((estimate - wanted).norm() / wanted.norm()))
            steps = [orthogonalised(matrix) for matrix in (estimate, wanted)]
            alignments.append(float((steps[0] * steps[1]).sum() / min(layer.shape)))
    return mean(errors), mean(alignments)


def orthogonalised(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v
