"""What it costs a round that workers may come and go, when none does.

    python scripts/chaos/cost.py

Three processes, messages of 2 bits of 0.8 M parameters, a round every step: medians of 100 steps
with fixed membership and with torchft's, in turns. Records go to results/chaos/cost.jsonl, and into
README.md beside it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import nn

from ef21_muon import LocalSteps
from ef21_muon.compressors import Quantize
from scripts.fleet import new_lighthouse
from training.config import ROOT

OUTPUT = ROOT / "results" / "chaos" / "cost.jsonl"
WORKERS, PORT = 3, 29533
WARM_UP, STEPS, TURNS = 10, 100, 3


def build(kind: str, worker: int) -> tuple[nn.Module, LocalSteps]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12)))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"sync_every": 1, "w2s": Quantize("normal2"), "server": "replicated", "seed": 0}
    if kind == "fixed":
        dist.init_process_group("gloo")
        return model, LocalSteps(inner, **options)
    from ef21_muon.fleet import Fleet

    fleet = Fleet(worker, f"http://localhost:{PORT}")
    optimizer = LocalSteps(inner, transport=fleet, **options)
    fleet.join()
    while len(fleet.quorums[-1].workers) < WORKERS:  # until all are there
        model(torch.ones(4, 256)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def measure(kind: str, worker: int) -> float:
    """Seconds of a step, the median."""
    model, optimizer = build(kind, worker)
    times = []
    for _ in range(WARM_UP + STEPS):
        model(torch.ones(4, 256)).square().mean().backward()
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return median(times[WARM_UP:])


def run(kind: str) -> float:
    """Of the worker that takes longest."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launches = [(3, 0)] if kind == "fixed" else [(1, worker) for worker in range(WORKERS)]
    jobs = [
        subprocess.Popen(
            [*torchrun, f"--nproc_per_node={ranks}", __file__, kind, str(worker)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for ranks, worker in launches
    ]
    outputs = [job.communicate()[0] for job in jobs]
    return max(float(line) for output in outputs for line in output.split())


def main() -> None:
    if len(sys.argv) == 3:
        seconds = measure(sys.argv[1], int(sys.argv[2]))
        print(seconds, flush=True)
        os._exit(0)  # whoever is first is not waited for
    records = []
    for turn in range(TURNS):
        server = new_lighthouse(WORKERS, PORT)
        record = {"record": "cost", "turn": turn}
        record |= {kind: round(1e3 * run(kind), 2) for kind in ("fixed", "torchft")}
        server.shutdown()
        records.append(record)
        print(json.dumps(record), flush=True)
    OUTPUT.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
