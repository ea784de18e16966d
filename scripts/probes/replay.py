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
from torch import Tensor

from ef21_muon import EF21Muon
from ef21_muon.compressors.base import Compressor
from scripts.probes.trainings import ROUNDS, config_of, is_measured, worker_gradients
from scripts.shakespeare.results import LOCAL, OTHERS
from scripts.shakespeare.runs import SERVER, SETTINGS
from training.config import build

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


def replay(gradients: Sequence[Tensor], w2s: Compressor, momentum: float) -> tuple[float, float]:
    """Send one layer's gradients: mean error of the estimator, and mean alignment."""
    layer = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = EF21Muon([layer], lr=0.0, w2s=w2s, momentum=momentum, seed=0)
    errors, alignments = [], []
    for done, gradient in enumerate(gradients, 1):
        layer.grad = gradient
        optimizer.step()
        if is_measured(done, len(gradients)):
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
