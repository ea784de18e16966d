"""Why compression costs loss: replay one worker's messages. `python scripts/shakespeare/replay.py`.

The uncompressed run of the study is trained in one process, and the gradients that its first worker
has of a few layers are kept. Every compressor of the study then sends them, M_j - G_j round after
round as in Algorithm 1 of arXiv:2510.00643, and it is measured how far G_j is from the momentum M_j
(Frobenius norm), and how far the step that the LMO makes of it is from the step that it would make
of M_j. The means over rounds and layers go to results/shakespeare/replay.jsonl, and
scripts/shakespeare/figures.py draws them beside the losses. Gradients are the same for all: what
compression does to the path of the model is left out.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.loader import WorkerBatches
from ef21_muon import EF21Muon
from ef21_muon.compressors.base import Compressor
from model import GPT
from scripts.shakespeare.results import REPLAY_LOG, RESULTS
from scripts.shakespeare.settings import SETTINGS
from training.config import build, compose
from training.data import open_data
from training.method import build_optimizer

WORKERS = 2
LAYERS = (
    "blocks.1.attention.query.weight",
    "blocks.2.attention.value.weight",
    "blocks.1.mlp.expand.weight",
    "blocks.2.mlp.project.weight",
)
ROUNDS = 200  # all before the cooldown, at the full step
EVERY = 5  # rounds between two that are measured
NOT_REPLAYED = (
    "grid",
    "feedback",
    "both ways",
    "embedding apart",
    "quantized rank, server momentum",
)


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


def replay(gradients: Sequence[Tensor], w2s: Compressor, momentum: float) -> tuple[float, float]:
    """Send one layer's gradients: mean estimator error and mean LMO alignment.

    ||G - M|| / ||M||, and <U V^T of G, U V^T of M> / min(m, n), 1 where the steps of the spectral
    norm are the same; over rounds of the second half.
    """
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args(arguments)
    torch.set_num_threads(1)
    configs = {
        setting.name: compose(("experiment=shakespeare", *setting.overrides)).config
        for setting in SETTINGS
        if setting.family not in NOT_REPLAYED
    }
    gradients = worker_gradients(configs["identity"], ROUNDS)
    lines = []
    for name, config in configs.items():
        if not config.optimizer._target_.endswith("EF21Muon"):
            continue
        w2s, momentum = build(config.w2s, "w2s"), config.optimizer.momentum
        measured = [replay(of_layer, w2s, momentum) for of_layer in gradients.values()]
        error, alignment = (mean(values) for values in zip(*measured, strict=True))
        record = {"name": name, "error": error, "alignment": alignment}
        print(f"{name:<20} error {error:.3f}  alignment {alignment:.3f}", flush=True)
        lines.append(json.dumps(record) + "\n")
    (RESULTS / REPLAY_LOG).write_text("".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
