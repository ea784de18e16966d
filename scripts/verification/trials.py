"""Trials on tiny layers: what scripts/verify.py trains, and how it measures.

Data and starts are drawn on the CPU from seeds, so that they are the same everywhere.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.norms import Sign, Spectral
from ef21_muon.norms.lmo import BiasRMS
from ef21_muon.transport.agreement import fingerprint
from ef21_muon.transport.host import sender
from training.workers import Workers

Parameters = dict[str, Parameter]
Compressors = dict[str, str]  # specs by role

STEPS, SAMPLES = 3, 16
LR, BETA = 0.05, 0.1
ROLES = {
    "hidden": {"tall": (40, 12), "wide": (9, 31), "square": (16, 16)},
    "heads": {"head": (7, 21), "embedding": (7, 21), "router": (7, 21)},
    "biases": {"bias": (15,)},
}
SHAPES = {name: shape for layers in ROLES.values() for name, shape in layers.items()}
# Layers of one shape are a batch, and every server has a part of it. A product of a part of a batch
# of matrices may be rounded otherwise than that of all, so where bits are compared only heads have
# a shape in common, and an LMO that works entry by entry.
NORMS = {"hidden": Spectral(dtype=torch.float32), "heads": Sign(), "biases": BiasRMS()}
RADII = {"hidden": 1.0, "heads": 3.0, "biases": 1.0}
UNCOMPRESSED = dict.fromkeys(ROLES, "identity")


def orthogonal(d: Tensor) -> Tensor:
    """sqrt(d_out / d_in) U V^T by five steps of Jordan's quintic."""
    d_out, d_in = d.shape
    x = d.T if d_out > d_in else d
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (d_out / d_in) ** 0.5 * (x.T if d_out > d_in else x)


PUBLISHED = {
    "hidden": orthogonal,
    "heads": lambda d: d.sign() / d.shape[1],
    "biases": lambda d: d / d.square().mean().sqrt(),
}


class Scion:
    """Constrained Scion as published (arXiv:2502.07529), for gradients of the whole batch.

    d <- (1 - beta) d + beta g from zero; x <- (1 - lr) x + lr radius lmo(d).
    """

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.averages = {name: torch.zeros_like(x) for name, x in parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        for role, layers in ROLES.items():
            for name in layers:
                x, d = self.parameters[name], self.averages[name]
                d.mul_(1 - BETA).add_(x.grad, alpha=BETA)
                x.mul_(1 - LR).sub_(PUBLISHED[role](d), alpha=LR * RADII[role])


Build = Callable[[Parameters], Optimizer | Scion]


def ours(w2s: Compressors = UNCOMPRESSED, s2w: Compressors = UNCOMPRESSED, **options) -> Build:
    """Builds an EF21Muon with these compressors and options."""

    def build(parameters: Parameters) -> EF21Muon:
        groups = [
            {
                "name": role,
                "params": [(name, parameters[name]) for name in layers],
                "norm": NORMS[role],
                "radius": RADII[role],
                "w2s": w2s[role],
                "s2w": s2w[role],
            }
            for role, layers in ROLES.items()
        ]
        return EF21Muon(groups, **{"lr": LR, "momentum": 1 - BETA} | options)

    return build


def local(w2s: Compressors = UNCOMPRESSED, s2w: Compressors = UNCOMPRESSED, **options) -> Build:
    """Builds local steps of EF21Muon, a round in all STEPS, with these compressors and options."""
    inner, options = ours(process_group=ALONE), {"sync_every": STEPS} | options
    return lambda parameters: LocalSteps(inner(parameters), w2s=w2s, s2w=s2w, **options)


def start(device: torch.device) -> Parameters:
    """The layers before the first step."""
    return {
        name: Parameter(gaussian(shape, device, 0, place) / 4)
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def loss(parameters: Parameters, batch: Iterable[int], step: int) -> Tensor:
    """Mean of ||X A - B||^2 / 2 over the samples of some workers, summed over layers."""
    total = 0
    for place, parameter in enumerate(parameters.values()):
        x = parameter.view(len(parameter), -1)
        targets, inputs = (
            torch.cat([gaussian((n, SAMPLES), x.device, of, place, step, w) for w in batch], 1)
            for of, n in enumerate(x.shape, 1)
        )
        total += (x @ inputs - targets).square().sum() / (2 * inputs.shape[1])
    return total


def train(
    workers: Workers,
    build: Build,
    batch: Iterable[int] | None = None,
    average: bool = False,
    inside: AbstractContextManager | None = None,
) -> tuple[Parameters, Optimizer | Scion]:
    """Parameters and optimizer after STEPS steps on this worker's samples.

    batch: workers whose samples to take instead. average: with the mean of all workers' gradients.
    inside: is entered for the steps.
    """
    parameters = start(workers.device)
    optimizer = build(parameters)
    with inside or nullcontext():
        for step in range(STEPS):
            for parameter in parameters.values():
                parameter.grad = None
            loss(parameters, [workers.rank] if batch is None else batch, step).backward()
            if average:
                for parameter in parameters.values():
                    parameter.grad.copy_(mean_of(workers, parameter.grad))
            optimizer.step()
    return parameters, optimizer


class Sent(TorchDispatchMode):
    """While it is entered, `bytes` counts what this rank hands to the network.

    It sees every call of a c10d operator, however torch.distributed is used, also of the thread
    that sends from the host's memory; RuntimeError for one that no step has a need of.
    """

    def __init__(self, workers: Workers, elsewhere: bool = True):
        super().__init__()
        self.others, self.here = workers.count - 1, 0
        self.of_sender = Sent(workers, elsewhere=False) if elsewhere else None

    @property
    def bytes(self) -> int:
        return self.here + (self.of_sender.here if self.of_sender else 0)

    def __enter__(self):
        if self.of_sender:
            sender().submit(self.of_sender.__enter__).result()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.of_sender:
            sender().submit(self.of_sender.__exit__, *error).result()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.c10d.send.default:
            self.here += sum(tensor.nbytes for tensor in args[0])
        elif operator is torch.ops.c10d._allgather_base_.default:
            self.here += self.others * args[1].nbytes
        elif operator.namespace == "c10d" and operator is not torch.ops.c10d.recv_.default:
            raise RuntimeError(f"a step called {operator}, whose bytes are not counted")
        return operator(*args, **(kwargs or {}))


def gaussian(shape: tuple[int, ...], device: torch.device, *seed: int) -> Tensor:
    """Standard normal numbers. seed: numbers below 1000, but for the last."""
    number = sum(part * 1000**place for place, part in enumerate(seed))
    return torch.randn(shape, generator=Generator().manual_seed(number)).to(device)


def as_matrix(tensor: Tensor) -> Tensor:
    """As the optimizer sees it: n entries are (n, 1)."""
    return tensor.detach().reshape(len(tensor), -1)


def sum_of(tensor: Tensor) -> Tensor:
    """The sum over all workers, in float64."""
    total = tensor.detach().to(torch.float64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def mean_of(workers: Workers, tensor: Tensor) -> Tensor:
    """The mean over all workers, in float64."""
    return sum_of(tensor) / workers.count


def server_gradient(optimizer: EF21Muon, parameter: Parameter) -> Tensor:
    """G of a layer, the mean over its servers, in float64; NaN if it has none."""
    zero = torch.zeros_like(as_matrix(parameter))
    found = optimizer.state[parameter].get("server_gradient", zero)
    return sum_of(found) / sum_of(torch.tensor(found is not zero, device=zero.device))


def distance(found: Tensor, expected: Tensor) -> Tensor:
    """||found - expected|| / ||expected||, 0 where they are equal."""
    found, expected = found.detach().double(), expected.detach().double()
    error = (found - expected).norm()
    return torch.where(error == 0, 0.0, error / expected.norm())


def update_distance(found: Parameters, expected: Parameters) -> float:
    """The distance of one model's update from another's, the largest of all layers."""
    origin = start(found["bias"].device)
    return largest(distance(found[name] - x, expected[name] - x) for name, x in origin.items())


def largest(numbers: Iterable[float | Tensor]) -> float:
    """NaN if any is."""
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64).max().item()


def differing(first: Parameters, second: Parameters) -> int:
    """Entries that are not the same, bit for bit."""
    pairs = ((first[name].view(torch.int32), second[name].view(torch.int32)) for name in SHAPES)
    return sum(int((a != b).sum()) for a, b in pairs)


def differing_on_workers(workers: Workers, tensors: Iterable[Tensor]) -> int:
    """Tensors that are not the same on all workers, bit for bit."""
    mine = torch.stack([fingerprint(tensor) for tensor in tensors])
    every = [torch.empty_like(mine) for _ in range(workers.count)]
    dist.all_gather(every, mine)
    return int((torch.stack(every) != mine).any(0).sum())
