"""Step times over slow links: EF21-Muon beside DDP, and over far ones how long local steps wait.

    python scripts/network/run.py [--rates 100mbit,1gbit] [--nodes 2] [--steps 3] [KEY=VALUE ...]

Needs root on Linux, iproute2 and, for the delay, /dev/net/tun (scripts/netns.py). Every node is a
namespace with one worker of one thread. The model is the tiny one widened to 9.7 M parameters. For
every rate one launch measures all methods, one after the other. The time to communicate is what a
step takes beyond the same step without the network: for EF21-Muon the time in its exchange, for DDP
the step time less that of the same steps under `no_sync`. Local steps train as train.py does, on
links with a delay and on unlimited ones; timed are as many steps as a round has. Writes
results/network/network.jsonl and README.md beside it, which --redraw makes of it anew.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from scripts.measuring import by_ranks
from scripts.netns import Network, requirements_missing
from scripts.studies import (
    OVERRIDES,
    command,
    fill,
    markdown,
    page,
    read_records,
    select,
    write_records,
)
from train import Run
from training.checkpoint import Checkpoints
from training.config import ROOT, compose
from training.log import NoLog
from training.renamed import modern_label
from training.workers import RunError, Workers, exit_process

LOG = ROOT / "results" / "network" / "network.jsonl"
OPTIONS = {
    **OVERRIDES,
    "--rates": {"default": "100mbit,1gbit", "help": "of the links"},
    "--far-rates": {"default": "10mbit,100mbit,1gbit", "help": "of those that local steps use"},
    "--delay": {"default": "50ms", "help": "of those, one way"},
    "--nodes": {"type": int, "default": 2, "help": "with a worker each"},
    "--steps": {"type": int, "default": 3, "help": "timed steps, not of local ones"},
}
WIDTH = 448
MODEL = [
    *(f"model.width={WIDTH}", "model.heads=4", "batch.micro_size=1", "schedule.cooldown=0"),
    "checkpoint.every=0",  # torch's PowerSGD keeps its state to itself
]
PATIENCE = 3600  # seconds for a launch
WARM_UP = 5  # steps before others are timed: PowerSGD's hook starts to compress in the third
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
TRAINING = ["check_every=0", "eval.every=1000", "eval.tokens=256", "log_every=5"]
EVERY = 30
LOCAL = ["optimizer=local", f"optimizer.sync_every={EVERY}"]
STREAMING, DELAYED = "optimizer.streaming=true", "optimizer.sync_delay=2"
FAR = {  # overrides, and how many steps are timed
    "sync every step": (["optimizer=ef21_muon"], 10),
    f"sync every {EVERY}": (LOCAL, EVERY),
    f"sync every {EVERY}, streaming": ([*LOCAL, STREAMING], EVERY),
    f"sync every {EVERY}, sync delay 2": ([*LOCAL, DELAYED], EVERY),
    f"sync every {EVERY}, streaming, sync delay 2": ([*LOCAL, STREAMING, DELAYED], EVERY),
}
# Of earlier records; the rest as labels of runs.
RENAMED = {"a message a step": "sync every step", "stagger": "streaming"}


def launch(options: argparse.Namespace) -> Iterator[dict]:
    """The records of all links, each of a launch of its own. Raises RunError if one fails."""
    if missing := requirements_missing():
        raise RunError(missing)
    links = [(rate, None, False) for rate in options.rates.split(",")]
    links += [(rate, options.delay, True) for rate in options.far_rates.split(",")]
    own = {"steps": options.steps, "overrides": options.overrides}
    for rate, delay, far in [*links, (None, None, True)]:
        with (
            tempfile.TemporaryDirectory() as folder,
            Network(options.nodes, rate, delay) as network,
        ):
            path, given = Path(folder, "records.jsonl"), json.dumps(own | {"far": far})
            try:
                network.torchrun(__file__, path, given, show=True, timeout=PATIENCE)
            except RuntimeError as error:
                raise RunError(str(error)) from error
            for record in read_records(path):
                yield {"rate": rate or "unlimited", "delay": delay} | record


def measure(options: argparse.Namespace, workers: Workers) -> Iterator[dict]:
    """The records of all methods of a link, on every node."""
    common = [*MODEL, f"batch.global_size={workers.count}", *options.overrides]
    near, far = measure_near(common, options.steps, workers), measure_far(common, workers)
    for record in far if options.far else near:
        workers.say(json.dumps(record))
        yield record


def measure_far(common: list[str], workers: Workers) -> Iterator[dict]:
    for name, (overrides, steps) in FAR.items():
        yield {"method": name} | time_training([*TRAINING, *common, *overrides], steps, workers)


def measure_near(common: list[str], timed: int, workers: Workers) -> Iterator[dict]:
    for name, method in (DDP | METHODS).items():
        steps = WARM_UP + 2 * timed  # those of DDP are timed twice
        config = compose((*common, f"steps={steps}", *method)).config
        run = Run(config, workers)
        seconds, sent, compute, communication = time_method(run, timed, name in DDP)
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


def time_method(run: Run, steps: int, behind_ddp: bool) -> tuple[float, float, float, list[float]]:
    """Per step seconds, bytes and seconds computing; of all steps those communicating."""
    for _ in range(WARM_UP if behind_ddp else 1):
        run.step()
    seconds, sent, communication = time_steps(run, steps)
    if not behind_ddp:
        return seconds, sent, seconds - sum(communication) / steps, communication
    with run.gradients.without_sync():
        compute, *_ = time_steps(run, steps)
    return seconds, sent, compute, [seconds - compute]


def time_steps(run: Run, steps: int) -> tuple[float, float, list[float]]:
    """Seconds and bytes handed to the network, per step; of all steps the seconds in exchanges."""
    dist.barrier()
    run.optimizer.timer.read()
    start, sent, exchanges = time.perf_counter(), run.optimizer.wire_tx_bytes, []
    for _ in range(steps):
        run.step()
        exchanges.append(run.optimizer.timer.read().get("exchange", 0.0))
    seconds = time.perf_counter() - start
    return seconds / steps, (run.optimizer.wire_tx_bytes - sent) / steps, exchanges


class Records(NoLog):
    """In place of a run's log, on every rank: the train records by step."""

    def __init__(self):
        self.of_step = {}

    def train(self, record: dict) -> None:
        self.of_step[record["step"]] = record


def time_training(overrides: list[str], steps: int, workers: Workers) -> dict:
    """After the warm-up, per step: seconds, bytes, tokens, and the waiting of every rank.

    Training waits in the exchange, and for what else workers send each other, which is in no phase.
    """
    last = WARM_UP + steps
    run = Run(compose((*overrides, f"steps={last + 1}")).config, workers)
    records = Records()
    run.train(records, Checkpoints(Path(), workers, keep=1, asynchronous=False))
    start, end = records.of_step[WARM_UP], records.of_step[last]
    computing = sum(
        end["phases"][phase] - start["phases"][phase]
        for phase in end["phases"]
        if phase != "exchange"
    )
    numbers = ("seconds", "w2s_bytes", "wire_tx_bytes", "tokens")
    return {
        **{name: (end[name] - start[name]) / steps for name in numbers},
        "waiting": workers.gather((end["seconds"] - start["seconds"] - computing) / steps),
        "placement": run.optimizer.server,
        "parameters": run.raw_model.config.parameter_count,
    }


def report(records: list[dict]) -> str:
    far = [one for one in records if "waiting" in one]
    near = [one for one in records if "waiting" not in one]
    rates = dict.fromkeys(one["rate"] for one in near)
    values = {
        "near": "\n\n".join(near_table(select(near, rate=rate)) for rate in rates),
        "far": far_table(far),
        "delay": far[0]["delay"],
        "placement": far[0]["placement"],
        "millions": f"{far[0]['parameters'] / 1e6:.1f} M",
    }
    return fill(Path(__file__).with_name("report.md").read_text(), values)


def near_table(records: list[dict]) -> str:
    heading = ["MB per step", "s per step", "communicating", "less than DDP + Muon", "tokens/s"]
    rows = [["method", *heading]]
    for one in records:
        # A difference within the noise has no ratio.
        seconds, base = one["communication"], records[0]["communication"]
        less = f"{base / seconds:.1f}x" if seconds > 0.001 else "-"
        numbers = [f"{one['bytes'] / 1e6:.2f}", f"{one['seconds']:.2f}", f"{seconds:.3f}", less]
        rows.append([one["method"], *numbers, f"{one['tokens'] / one['seconds']:.0f}"])
    return f"### {records[0]['rate']}, {records[0]['nodes']} nodes\n\n{markdown(rows)}"


def far_table(records: list[dict]) -> str:
    rows = [["link", "method", "MB per step", "s per step", "waiting", "share", "tokens/s"]]
    for one in records:
        method, seconds, waiting = one["method"], one["seconds"], min(one["waiting"])
        for old, new in RENAMED.items():
            method = method.replace(old, new)
        numbers = [f"{one['w2s_bytes'] / 1e6:.3f}", f"{seconds:.3f}", f"{waiting:.3f}"]
        speeds = [f"{waiting / seconds:.1%}", f"{one['tokens'] / seconds:.0f}"]
        rows.append([one["rate"], modern_label(method), *numbers, *speeds])
    return markdown(rows, text_columns=2)


def main() -> int:
    if "RANK" in os.environ:
        path, given = sys.argv[1:]
        write_records(Path(path), by_ranks(measure)(argparse.Namespace(**json.loads(given))))
        return 0
    return command(__doc__, LOG, launch, page(report), OPTIONS)


if __name__ == "__main__":
    exit_process(main())
