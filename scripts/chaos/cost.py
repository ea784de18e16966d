"""What it costs a round that workers may come and go, when none does.

    python scripts/chaos/cost.py

Three processes, messages of 2 bits of 0.8 M parameters, a round every step: medians of 100 steps
with fixed membership and with torchft's, in turns. Records go to results/chaos/cost.jsonl, and into
README.md beside it.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from statistics import median

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import nn

from ef21_muon import LocalSteps
from ef21_muon.compressors import Quantize
from scripts.chaos.report import LOG, draw
from scripts.fleet import new_lighthouse
from scripts.studies import command
from scripts.supervise import free_port

WORKERS = 3
WARM_UP, STEPS, TURNS = 10, 100, 3
PATIENCE = 600  # seconds for the medians of all workers


def time_steps(kind: str, worker: int, port: int, medians) -> None:
    """Put the median seconds of this worker's steps, and step on, since others may not be done."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12)))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"sync_every": 1, "w2s": Quantize("normal2"), "server": "replicated", "seed": 0}

    def step() -> float:
        model(torch.ones(4, 256)).square().mean().backward()
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    if kind == "fixed":
        meet = f"tcp://localhost:{port}"
        dist.init_process_group("gloo", meet, world_size=WORKERS, rank=worker)
        optimizer = LocalSteps(inner, **options)
    else:
        from ef21_muon.fleet import Fleet

        fleet = Fleet(worker, f"http://localhost:{port}")
        optimizer = LocalSteps(inner, transport=fleet, **options)
        fleet.join()
        while len(fleet.quorums[-1].workers) < WORKERS:  # until all are there
            step()
    medians.put(median([step() for _ in range(WARM_UP + STEPS)][WARM_UP:]))
    while True:
        step()


def milliseconds(kind: str, port: int) -> float:
    """Of a step, of the worker that takes longest."""
    context = get_context("spawn")
    medians = context.Queue()
    workers = [
        context.Process(target=time_steps, args=(kind, worker, port, medians))
        for worker in range(WORKERS)
    ]
    try:
        for worker in workers:
            worker.start()
        return round(1e3 * max(medians.get(timeout=PATIENCE) for _ in workers), 2)
    finally:
        for worker in workers:
            worker.kill()


def measure(_: argparse.Namespace) -> Iterator[dict]:
    for turn in range(TURNS):
        port = free_port()
        server = new_lighthouse(WORKERS, port)
        fixed, torchft = milliseconds("fixed", free_port()), milliseconds("torchft", port)
        server.shutdown()
        yield {"record": "cost", "turn": turn, "fixed": fixed, "torchft": torchft}


if __name__ == "__main__":
    sys.exit(command(__doc__, LOG.with_name("cost.jsonl"), measure, draw))
