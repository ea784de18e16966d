"""Algorithm 1 on `scripts.theory.problems`: simulated, and by EF21Muon on real workers.

`simulate` plays the server and all workers in one process, with the norms and compressors of the
library; tests hold it against `train`, which is EF21Muon on one process per worker. Both return the
servers' iterates X^0, ..., X^K.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Generator, Tensor

from ef21_muon import EF21Muon
from ef21_muon.compressors.base import Compressor
from ef21_muon.norms.lmo import AdaptiveRadius, Norm
from scripts.theory.problems import Valley
from training.workers import exit_process


@dataclass(frozen=True)
class Setting:
    """Parameters of Algorithm 1, by the names of EF21Muon; `sigma` is the noise of a gradient.

    The noise is Gaussian with E ||xi||_2^2 = sigma^2.
    """

    norm: Norm
    w2s: Compressor
    beta: float
    radius: float | AdaptiveRadius
    s2w: Compressor
    first_message: str
    sigma: float = 0.0
    feedback: str = "ef21"


def simulate(problem, setting: Setting, rounds: int, replicas: int = 1, seed: int = 0) -> Tensor:
    """X^0, ..., X^K of independent replicas, K = `rounds`: (K + 1, replicas, m, k). EF21 only."""
    random = Generator().manual_seed(seed)
    noise = Noise(problem, setting.sigma, replicas, seed)

    def compress(compressor: Compressor, x: Tensor) -> Tensor:
        m, k = x.shape[-2:]
        compressor = compressor.fit(m, k)
        payload = compressor.encode(x.reshape(-1, m, k), random)
        return compressor.decode(payload, m, k).view_as(x)

    model = shift = problem.start.repeat(replicas, 1, 1)
    momentum = noise.gradients(shift)
    estimates = momentum
    if setting.first_message == "compressed":
        estimates = compress(setting.w2s, momentum)
    models = [model]
    for _ in range(rounds):
        gradient = estimates.mean(0)
        step = setting.norm.lmo(gradient)
        radius = setting.radius
        if isinstance(radius, AdaptiveRadius):
            radius = radius(-(gradient * step).sum((1, 2)))[:, None, None]
        model = model + radius * step  # line 3
        shift = shift + compress(setting.s2w, model - shift)  # lines 4-5
        momentum = momentum.lerp(noise.gradients(shift), setting.beta)  # line 9
        estimates = estimates + compress(setting.w2s, momentum - estimates)  # lines 10-11
        models.append(model)
    return torch.stack(models)


def train(problem, setting: Setting, rounds: int, replicas: int = 1, seed: int = 0) -> Tensor:
    """As `simulate`, by EF21Muon; this process is the worker of its rank, rank 0 the server too.

    On other ranks what is returned are the model shifts W^0, ..., W^K. Replicas are layers.
    """
    rank = dist.get_rank()
    noise = Noise(problem, setting.sigma, replicas, seed)
    shift = problem.start.repeat(replicas, 1, 1)
    parameters = [torch.nn.Parameter(layer) for layer in shift]
    optimizer = EF21Muon(
        parameters,
        lr=1.0,
        momentum=1 - setting.beta,
        norm=setting.norm,
        radius=setting.radius,
        w2s=setting.w2s,
        s2w=setting.s2w,
        feedback=setting.feedback,
        first_message=setting.first_message,
        server="rank0",
        buckets=1,
        seed=seed,
    )
    models = [shift.clone()]
    for _ in range(rounds):
        for parameter, gradient in zip(parameters, noise.gradients(shift)[rank], strict=True):
            parameter.grad = gradient
        optimizer.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        at_server = "server_model" in states[0]
        models.append(
            torch.stack([s["server_model"] for s in states]) if at_server else shift.clone()
        )
    return torch.stack(models)


class Noise:
    """Stochastic gradients of a problem: the same draws for the same seed on every worker."""

    def __init__(self, problem, sigma: float, replicas: int, seed: int):
        self.problem, self.scale = problem, sigma / problem.start.numel() ** 0.5
        self.shape = (replicas, *problem.start.shape)
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


def muon(
    valley: Valley,
    norm: Norm,
    beta: float,
    radius: Callable,
    rounds: int,
    lmo_feedback: bool = False,
) -> Tensor:
    """X^0, ..., X^K of Muon, which is EF21Muon with one worker; `radius` is a function of k."""
    model = torch.nn.Parameter(valley.start.clone())
    optimizer = EF21Muon([model], momentum=1 - beta, norm=norm, lmo_feedback=lmo_feedback)
    models = [model.detach().clone()]
    for k in range(rounds):
        optimizer.param_groups[0]["lr"] = radius(k)
        model.grad = valley.subgradient(model.detach())
        optimizer.step()
        models.append(model.detach().clone())
    return torch.stack(models)
