"""Batch normalisation on two ranks, whose running statistics part or are averaged.

Run by torchrun with a directory, rank r writes `rank<r>.json` there; see test_buffers.py.
"""

import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps, WorkerMesh
from ef21_muon.compressors import TopK

STEPS, EVERY = 7, 3


def of_two_ranks(model, **options):
    mesh = WorkerMesh(model.parameters(), ranks_per_worker=2)
    return EF21Muon(model.parameters(), mesh=mesh, **options)


def local_of_two_ranks(model, **options):
    mesh = WorkerMesh(model.parameters(), ranks_per_worker=2)
    inner = EF21Muon(mesh.share(model.parameters()), process_group=ALONE)
    return LocalSteps(inner, sync_every=EVERY, mesh=mesh, **options)


def local(model, **options):
    return LocalSteps(torch.optim.SGD(model.parameters(), lr=0.1), sync_every=EVERY, **options)


METHODS = {
    "ef21_muon": lambda m, **o: EF21Muon(m.parameters(), w2s=TopK(0.5), **o),
    "averaged": lambda m, **o: AveragedGradients(torch.optim.AdamW(m.parameters()), **o),
    "local": local,
    "local, delayed": lambda m, **o: local(m, sync_delay=1, streaming=True, **o),
    "two ranks a worker": of_two_ranks,
    "local, two ranks a worker": local_of_two_ranks,
}


class Constants(nn.Module):
    """A table that is alike on all ranks, and one that is no part of a state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.rand(5))
        self.register_buffer("again", torch.rand(5), persistent=False)

    def forward(self, x):
        return x


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), Constants(), nn.Linear(64, 6),
        nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 1),
    )  # fmt: skip


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (1 + rank) * torch.randn(8, 2, 6, 6, generator=generator) + rank


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def trained(name, averaged, steps=STEPS, resumed_at=None):
    """What is seen of a training."""
    lines = Lines()
    logging.getLogger("ef21_muon").addHandler(lines)
    model = new_model()
    optimizer = METHODS[name](model, **({"buffers": model} if averaged else {}))
    for step in range(steps):
        if step == resumed_at:
            saved = model.state_dict(), optimizer.state_dict()
            model = new_model()
            optimizer = METHODS[name](model, buffers=model)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        model.zero_grad()
        model.train()(batch(step, dist.get_rank())).square().mean().backward()
        optimizer.step()
    own = statistics_of(model)
    with getattr(optimizer, "global_params", nullcontext)():
        loss = model.eval()(batch(100, 0)).square().mean().item()
        shared = statistics_of(model)
    optimizer.check_agreement()
    logging.getLogger("ef21_muon").removeHandler(lines)
    return {
        "loss": loss,
        "own": own,
        "shared": shared,
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "counts": [int(b) for b in model.buffers() if not b.is_floating_point()],
        "bytes": [optimizer.w2s_bytes, optimizer.received_bytes, optimizer.wire_tx_bytes],
        "lines": lines.lines,
    }


def statistics_of(model):
    return torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()]).tolist()


def main(directory):
    dist.init_process_group("gloo")
    report = {}
    for name in METHODS:
        for averaged in (False, True):
            report[f"{name} {averaged}"] = trained(name, averaged)
    for at in (4, 6):
        report[f"resumed {at}"] = trained("local", True, resumed_at=at)
    model = new_model()
    optimizer = local(model, buffers=model)
    loss = model(batch(0, dist.get_rank())).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.final_sync()
    report["finished"] = statistics_of(model)
    if dist.get_rank() == 1:
        model[1].running_mean.add_(1)
    try:
        EF21Muon(model.parameters(), buffers=model)
    except ValueError as error:
        report["diverged"] = str(error)
    (directory / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
