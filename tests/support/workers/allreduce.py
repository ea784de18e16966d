"""Baselines behind DDP, and EF21Muon without compression, on the same data; see test_allreduce.py.

Writes DIRECTORY/rank{r}.npz: for every method its final parameters, the bytes that it counted, and
the bytes that were handed to `torch.distributed.all_reduce`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from baselines import AdamW, Muon
from ef21_muon import EF21Muon
from training.gradients import GradientComputation

STEPS = 6
SHAPES = [(32, 24), (16, 32)]
METHODS = {
    "adamw": lambda params: AdamW(params, lr=0.01),
    "muon": lambda params: Muon(params, lr=0.02),
    "muon float16": lambda params: Muon(params, lr=0.02, hook="float16"),
    "muon powersgd": lambda params: Muon(params, lr=0.02, hook="powersgd", rank=3),
    "muon greedylore": lambda params: Muon(
        params, lr=0.02, hook="greedylore", rank=3, refresh_every=4
    ),
    "adamw greedylore": lambda params: AdamW(
        params, lr=0.01, hook="greedylore", rank=3, refresh_every=4
    ),
    "adamw whole": lambda params: AdamW(
        params, lr=0.01, hook="greedylore", rank=3, refresh_every=1
    ),
    "ef21": lambda params: EF21Muon(params, lr=0.02),
}


def new_model() -> nn.Module:
    torch.manual_seed(0)
    first, second = (nn.Linear(n, m, bias=False) for m, n in SHAPES)
    return nn.Sequential(first, nn.Tanh(), second)


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a worker."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    inputs = torch.randn(8, 24, generator=generator)
    return inputs, inputs[:, :16].sin() + rank


def train(method: str, rank: int) -> dict[str, np.ndarray]:
    model = new_model()
    optimizer = METHODS[method]([{"name": "hidden", "params": list(model.parameters())}])
    forward = model if method == "ef21" else optimizer.wrap(model)
    with SpiedAllReduce() as spy:
        for step in range(STEPS):
            inputs, targets = batch(rank, step)
            (forward(inputs) - targets).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {
        f"{method} parameters": torch.cat([p.detach().flatten() for p in model.parameters()]),
        f"{method} counted": [optimizer.w2s_bytes, optimizer.s2w_bytes, optimizer.wire_tx_bytes],
        f"{method} seen": spy.bytes,
    }


class WithLoss(nn.Module):
    """A model whose output is the loss, as the trainer's."""

    def __init__(self):
        super().__init__()
        self.model = new_model()

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.model(inputs) - targets).square().mean()


def clipped(rank: int, max_norm: float) -> tuple[float, float]:
    """Norms: of the gradient in the trainer, and of its distance from torch's clipped mean."""
    ranks, model, reference = range(dist.get_world_size()), WithLoss(), WithLoss()
    optimizer = AdamW(model.parameters())
    passes = GradientComputation(model, optimizer, torch.device("cpu"), "float32", False, max_norm)
    passes.compute([batch(rank, step) for step in range(2)])
    losses = [reference(*batch(one, step)) for one in ranks for step in range(2)]
    torch.stack(losses).mean().backward()
    assert nn.utils.clip_grad_norm_(reference.parameters(), max_norm) > max_norm
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    distance = nn.utils.get_total_norm([mine.grad - its.grad for mine, its in pairs])
    return nn.utils.get_total_norm([p.grad for p in model.parameters()]), distance


class SpiedAllReduce:
    """Counts the bytes of tensors given to torch.distributed.all_reduce."""

    def __enter__(self):
        self.bytes, self.original = 0, dist.all_reduce
        dist.all_reduce = self.spy
        return self

    def __exit__(self, *error):
        dist.all_reduce = self.original

    def spy(self, tensor, *arguments, **options):
        self.bytes += tensor.nbytes
        return self.original(tensor, *arguments, **options)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {"clipped": [*map(float, clipped(rank, max_norm=0.1))]}
    for method in METHODS:
        results |= train(method, rank)
    np.savez(Path(sys.argv[1]) / f"rank{rank}.npz", **results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
