"""Algorithm 1 on `scripts.theory.problems`: simulated, and by EF21Muon on real workers.

`simulate` plays the server and all workers in one process, with the norms and compressors of the
library; tests hold it against `train`, which is EF21Muon on one process per worker. Both return the
servers' iterates X^0, ..., X^K.
"""

import tempfile
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Generator, Tensor

from ef21_muon import EF21Muon
from ef21_muon.compressors.base import Compressor
from ef21_muon.norms.lmo import AdaptiveRadius, Norm
from training.workers import exit_process


def simulate(
    problem,
    rounds: int,
    replicas: int = 1,
    sigma: float = 0.0,
    seed: int = 0,
    *,
    norm: Norm,
    w2s: Compressor,
    s2w: Compressor,
    momentum: float,
    radius: float | AdaptiveRadius,
    first_message: str,
) -> Tensor:
    """X^0, ..., X^K of independent replicas, K = `rounds`: (K + 1, replicas, m, k).

    Gradients have Gaussian noise with E ||xi||_2^2 = sigma^2. The options are those of EF21Muon.
    """
    random = Generator().manual_seed(seed)
    noise = Noise(problem, sigma, seed)

    def compress(compressor: Compressor, x: Tensor) -> Tensor:
        m, k = x.shape[-2:]
        compressor = compressor.fit(m, k)
        payload = compressor.encode(x.reshape(-1, m, k), random)
        return compressor.decode(payload, m, k).view_as(x)

    model = shift = problem.start.repeat(replicas, 1, 1)
    averages = noise.gradients(shift)
    estimates = compress(w2s, averages) if first_message == "compressed" else averages
    models = [model]
    for _ in range(rounds):
        gradient = estimates.mean(0)
        step = norm.lmo(gradient)
        length = radius
        if isinstance(radius, AdaptiveRadius):
            length = radius(-(gradient * step).sum((1, 2)))[:, None, None]
        model = model + length * step  # line 3
        shift = shift + compress(s2w, model - shift)  # lines 4-5
        averages = averages.lerp(noise.gradients(shift), 1 - momentum)  # line 9
        estimates = estimates + compress(w2s, averages - estimates)  # lines 10-11
        models.append(model)
    return torch.stack(models)


def train(
    problem, rounds: int, replicas: int = 1, sigma: float = 0.0, seed: int = 0, **options
) -> Tensor:
    """As `simulate`, by EF21Muon; this process is the worker of its rank, rank 0 the server too.

    On other ranks what is returned are the model shifts W^0, ..., W^K. Replicas are layers.
    """
    noise, rank = Noise(problem, sigma, seed), dist.get_rank()
    gradients = repeat(lambda points: noise.gradients(points)[rank], rounds)
    start = problem.start.repeat(replicas, 1, 1)
    return descend(start, gradients, server="rank0", seed=seed, **options)


def descend(
    start: Tensor,
    gradients: Iterable[Callable[[Tensor], Tensor]],
    lr: Iterable[float] = repeat(1.0),
    **options,
) -> Tensor:
    """X^0, ..., X^K by EF21Muon with these options, or W^0, ..., W^K where it is no server.

    Args:
        start: (layers, m, k).
        gradients: Of every round, a function of the parameters (layers, m, k).
        lr: Of every round.
    """
    points = start.clone()
    layers = [torch.nn.Parameter(layer) for layer in points]  # which share its memory
    optimizer = EF21Muon(layers, buckets=1, **options)
    models = [start]
    for gradient, rate in zip(gradients, lr, strict=False):

        def closure(gradient=gradient) -> None:
            for layer, part in zip(layers, gradient(points), strict=True):
                layer.grad = part

        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(closure)
        at_servers = [
            optimizer.state[layer].get("server_model", layer.detach()) for layer in layers
        ]
        models.append(torch.stack(at_servers))
    return torch.stack(models)


class Noise:
    """Stochastic gradients of a problem: the same draws for the same seed on every worker."""

    def __init__(self, problem, sigma: float, seed: int):
        self.problem, self.scale = problem, sigma / problem.start.numel() ** 0.5
        self.random = Generator().manual_seed(seed + 1)

    def gradients(self, points: Tensor) -> Tensor:
        """grad f_j(X; xi_j) at X (replicas, m, k) for every j: (n, replicas, m, k)."""
        exact = self.problem.gradients(points).float()
        if self.scale == 0:
            return exact
        return exact + self.scale * torch.randn(exact.shape, generator=self.random)


def gradient_norms(problem, norm: Norm, models: Tensor) -> Tensor:
    """||grad f(X)||_* of models (..., m, k): (...), float64."""
    parts = models.double().split(512)
    return torch.cat([norm.dual(problem.gradients(part).mean(0)) for part in parts])


def on_workers(count: int, work: Callable, *arguments) -> object:
    """Call work(*arguments) on `count` new processes, a gloo group; returns what rank 0 returned.

    `work` is a function of a module, arguments and result are what torch.save takes.
    """
    with tempfile.TemporaryDirectory() as directory:
        processes.start_processes(
            _join, (count, directory, work, arguments), count, start_method="spawn"
        )
        return torch.load(Path(directory) / "result.pt", weights_only=False)


def _join(rank: int, count: int, directory: str, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
    result = work(*arguments)
    if rank == 0:
        torch.save(result, Path(directory) / "result.pt")
    dist.destroy_process_group()
    exit_process(0)
