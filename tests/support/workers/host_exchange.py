"""Least squares on two ranks, whose messages go through the host's memory; see test_host.py.

    host_exchange.py DIRECTORY DEVICE PATH

DEVICE is cpu or cuda, which all ranks share; PATH is host, or direct as gloo sends on the CPU.
Writes DIRECTORY/rank{r}.npz: parameters and bytes for every case.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import Parameter

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import Quantize, TopK
from ef21_muon.norms import Sign, Spectral
from ef21_muon.transport import fixed as collectives

SHAPES = {"query": (12, 20), "key": (12, 20), "fc": (30, 12), "head": (16, 12)}
STEPS = 5


def muon(parameters: list, **options) -> EF21Muon:
    return EF21Muon(parameters, lr=0.02, norm=Spectral(dtype=torch.float32), **options)


CASES = {
    **{
        server: lambda parameters, server=server: muon(parameters, w2s=TopK(0.2), server=server)
        for server in ("sharded", "rank0", "replicated")
    },
    "both ways": lambda parameters: muon(parameters, w2s=TopK(0.2), s2w=TopK(0.3)),
    "no layer of a rank": lambda parameters: EF21Muon(parameters[:1], norm=Sign(), server="rank0"),
    "local": lambda parameters: LocalSteps(
        muon(parameters, process_group=ALONE),
        sync_every=2,
        w2s=Quantize("normal2"),
        outer_momentum=0.3,
    ),
    "local, delay": lambda parameters: LocalSteps(
        muon(parameters, process_group=ALONE),
        sync_every=4,
        sync_delay=1,
        streaming=True,
        server="sharded",
    ),
    "local, delay, replicated": lambda parameters: LocalSteps(
        muon(parameters, process_group=ALONE),
        sync_every=3,
        sync_delay=1,
        w2s=TopK(0.3),
        server="replicated",
    ),
    "averaged": lambda parameters: AveragedGradients(
        torch.optim.AdamW(parameters, lr=0.01), w2s=TopK(0.3)
    ),
}


def main(directory: str, device: str, path: str) -> None:
    dist.init_process_group("gloo")
    torch.compiler.set_stance("force_eager")  # it takes longer than all else here
    if device == "cpu" and path == "host":
        collectives.sends_from_host = lambda group, device: True
    rank, results = dist.get_rank(), {}
    for case, build in CASES.items():
        generator = torch.Generator().manual_seed(0)
        layers = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
        parameters = [Parameter(layer.to(device)) for layer in layers]
        goals = [torch.randn(shape, generator=generator) + rank for shape in SHAPES.values()]
        optimizer = build(parameters)
        for _ in range(STEPS):
            for parameter, goal in zip(parameters, goals, strict=True):
                parameter.grad = parameter.detach() - goal.to(device)
            optimizer.step()
            optimizer.check_agreement()  # while messages may be under way
        results[f"{case} model"] = torch.cat([p.detach().flatten().cpu() for p in parameters])
        results[f"{case} bytes"] = [optimizer.w2s_bytes, optimizer.wire_tx_bytes]
    np.savez(Path(directory, f"rank{rank}.npz"), **results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
