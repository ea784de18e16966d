"""Step times over slow links: EF21-Muon beside DDP, on nodes joined at a given rate.

    python scripts/network/run.py [--rates 100mbit,1gbit] [--nodes 2] [--steps 3] [KEY=VALUE ...]

Needs root on Linux and iproute2 (scripts/netns.py). Every node is a namespace with one worker of
one thread. The model is the tiny one widened to 9.7 M parameters; a method's time to communicate is
what a step takes beyond the same step without the network: for EF21-Muon the time in its exchange,
for DDP the step time less that of the same steps under `no_sync`. Writes
results/network/network.jsonl and README.md beside it, which --redraw makes of it anew.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from scripts.measuring import job, over_links
from scripts.studies import OVERRIDES, command, markdown, page
from train import Run
from training.config import ROOT, compose
from training.workers import Workers, exit_process

LOG = ROOT / "results" / "network" / "network.jsonl"
OPTIONS = {
    **OVERRIDES,
    "--rates": {"default": "100mbit,1gbit", "help": "of the links"},
    "--nodes": {"type": int, "default": 2, "help": "with a worker each"},
    "--steps": {"type": int, "default": 3, "help": "timed steps"},
}
WIDTH = 448
MODEL = [
    *(f"model.width={WIDTH}", "model.heads=4", "batch.micro_size=1", "schedule.cooldown=0"),
    "checkpoint.every=0",  # torch's PowerSGD keeps its state to itself
]
WARM_UP = 4  # steps before DDP is timed: the PowerSGD hook starts to compress in the third
RANK = 0.15
DDP = {
    "DDP + Muon": ["optimizer=muon"],
    f"DDP + PowerSGD rank {RANK:.0%} + Muon":
        ["optimizer=muon_powersgd", f"optimizer.rank={round(RANK * WIDTH)}"],
}  # fmt: skip
LEVELS = {
    "identity": ["compressor@w2s=identity"],
    "rank 15% natural": ["compressor@w2s=rank", f"w2s.fraction={RANK}"],
    "rank 5% natural4": ["compressor@w2s=rank", "w2s.fraction=0.05", "w2s.values=natural4"],
    "top 5% natural4": ["compressor@w2s=topk", "w2s.fraction=0.05", "w2s.values=natural4"],
}
BACK = ["compressor@s2w=rank", "s2w.fraction=0.15"]
METHODS = {
    **{f"{level}, {server}": [*how, f"optimizer.server={server}"]
       for level, how in LEVELS.items() for server in ("sharded", "replicated")},
    "rank 15% natural both ways, sharded": [*LEVELS["rank 15% natural"], *BACK],
    "rank 15% natural both ways, sharded, 1 bucket":
        [*LEVELS["rank 15% natural"], *BACK, "optimizer.buckets=1"],
    "rank 15% natural, replicated, 1 bucket":
        [*LEVELS["rank 15% natural"], "optimizer.server=replicated", "optimizer.buckets=1"],
}  # fmt: skip


def launch(options: argparse.Namespace) -> Iterator[dict]:
    own = {"steps": options.steps, "overrides": options.overrides}
    yield from over_links(__file__, options.nodes, options.rates.split(","), None, **own)


def measure(options: argparse.Namespace, workers: Workers) -> Iterator[dict]:
    """The records of all methods, on every node."""
    for name, method in (DDP | METHODS).items():
        steps = WARM_UP + 2 * options.steps  # those of DDP are timed twice
        common = [*MODEL, f"batch.global_size={workers.count}", f"steps={steps}"]
        config = compose((*common, *options.overrides, *method)).config
        timed = time_ddp if name in DDP else time_ef21
        seconds, sent, compute, communication = timed(Run(config, workers), options.steps)
        # The rank that comes last to a step waits least: its time is the network's.
        least = [min(ranks) for ranks in zip(*workers.gather(communication), strict=True)]
        yield {
            "nodes": workers.count,
            "method": name,
            "seconds": seconds,
            "communication": sum(least) / len(least),
            "compute": compute,
            "bytes": sent,
            "tokens": config.batch.global_size * config.model.context,
        }


def time_steps(run: Run, steps: int, after_each: Callable = lambda: None) -> tuple[float, float]:
    """Seconds and bytes handed to the network, per step."""
    dist.barrier()
    start, sent = time.perf_counter(), run.optimizer.wire_tx_bytes
    for _ in range(steps):
        run.step()
        after_each()
    seconds = time.perf_counter() - start
    return seconds / steps, (run.optimizer.wire_tx_bytes - sent) / steps


def time_ef21(run: Run, steps: int) -> tuple[float, float, float, list[float]]:
    """Per step seconds, bytes and seconds computing; of all steps those communicating."""
    run.step()
    run.optimizer.timer.read()
    exchange = []
    seconds, sent = time_steps(
        run, steps, lambda: exchange.append(run.optimizer.timer.read()["exchange"])
    )
    return seconds, sent, seconds - sum(exchange) / steps, exchange


def time_ddp(run: Run, steps: int) -> tuple[float, float, float, list[float]]:
    """The same of a baseline behind DDP."""
    for _ in range(WARM_UP):
        run.step()
    seconds, sent = time_steps(run, steps)
    with run.gradients.without_sync():
        compute, _ = time_steps(run, steps)
    return seconds, sent, compute, [seconds - compute]


def report(records: list[dict]) -> str:
    by_rate: dict[str, list[dict]] = {}
    for record in records:
        by_rate.setdefault(record["rate"], []).append(record)
    text = """# Step times over slow links

`sudo python scripts/network/run.py`: nodes are network namespaces of one machine, one
worker of one thread each; 9.7 M parameters, a sequence of 256 tokens per worker and step.
Communicating: the exchange of EF21-Muon, on the rank that waits least in each step, or
what a DDP step takes beyond the same step under `no_sync`. MB are what a rank hands to
the network (DDP: of a ring all-reduce). DDP's time is a difference of two measurements
and as noisy as the machine; where it is below 0, it is lost in that noise.
"""
    heading = ["MB per step", "s per step", "communicating", "less than DDP + Muon", "tokens/s"]
    for rate, records in by_rate.items():
        base = records[0]["communication"]
        rows = [
            [
                one["method"],
                f"{one['bytes'] / 1e6:.2f}",
                f"{one['seconds']:.2f}",
                f"{one['communication']:.3f}",
                ratio(base, one["communication"]),
                f"{one['tokens'] / one['seconds']:.0f}",
            ]
            for one in records
        ]
        table = markdown([["method", *heading], *rows])
        text += f"\n## {rate}, {records[0]['nodes']} nodes\n\n{table}\n"
    return text


def ratio(base: float, seconds: float) -> str:
    """How often `seconds` goes into `base`; a difference within the noise has no ratio."""
    return f"{base / seconds:.1f}x" if seconds > 0.001 else "-"


def main() -> int:
    if "RANK" in os.environ:
        return job(measure)
    return command(__doc__, LOG, launch, page(report), OPTIONS)


if __name__ == "__main__":
    exit_process(main())
