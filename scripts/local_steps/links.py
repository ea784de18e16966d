"""Local steps over slow and far links, beside a sync every step: how long training waits.

    python scripts/local_steps/links.py [--rates 10mbit,100mbit,1gbit] [--delay 50ms] [KEY=VALUE]
    python scripts/local_steps/links.py --redraw

Needs root on Linux, iproute2 and /dev/net/tun (scripts/netns.py). For every rate one launch of two
nodes with a worker of one thread each trains with all METHODS, one after the other, as train.py
does; then without a limit and a delay. Timed are as many steps as a round has. Writes
results/local_steps/links.jsonl and README.md beside it, which --redraw makes of it anew.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.measuring import UNLIMITED, job, over_links
from scripts.studies import OVERRIDES, command, markdown, page
from train import Run
from training.checkpoint import Checkpoints
from training.config import ROOT, compose
from training.log import NoLog
from training.renamed import modern_label
from training.workers import Workers, exit_process

LOG = ROOT / "results" / "local_steps" / "links.jsonl"
OPTIONS = {
    **OVERRIDES,
    "--rates": {"default": "10mbit,100mbit,1gbit", "help": "of the links"},
    "--delay": {"default": "50ms", "help": "one way"},
}
EVERY = 30
COMMON = [
    *("model.width=448", "model.heads=4", "batch.micro_size=1", "batch.global_size=2"),
    *("schedule.cooldown=0", "checkpoint.every=0", "check_every=0", "eval.every=1000"),
    *("eval.tokens=256", "log_every=5"),
]
LOCAL = ["optimizer=local", f"optimizer.sync_every={EVERY}"]
STREAMING, DELAYED = "optimizer.streaming=true", "optimizer.sync_delay=2"
WARM_UP = 5
METHODS = {  # overrides, and how many steps are timed
    "sync every step": (["optimizer=ef21_muon"], 10),
    f"sync every {EVERY}": (LOCAL, EVERY),
    f"sync every {EVERY}, streaming": ([*LOCAL, STREAMING], EVERY),
    f"sync every {EVERY}, sync delay 2": ([*LOCAL, DELAYED], EVERY),
    f"sync every {EVERY}, streaming, sync delay 2": ([*LOCAL, STREAMING, DELAYED], EVERY),
}
# Of earlier records; the rest as labels of runs.
RENAMED = {"a message a step": "sync every step", "stagger": "streaming"}


class Records(NoLog):
    """In place of a run's log, on every rank: the train records by step."""

    def __init__(self):
        self.of_step = {}

    def train(self, record: dict) -> None:
        self.of_step[record["step"]] = record


def time_training(overrides: list[str], steps: int, workers: Workers) -> dict:
    """Of the steps after WARM_UP, per step: seconds, bytes, tokens, and the waiting of every rank.

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


def launch(options: argparse.Namespace) -> Iterator[dict]:
    rates = [*options.rates.split(","), UNLIMITED]
    yield from over_links(__file__, 2, rates, options.delay, overrides=options.overrides)


def measure(options: argparse.Namespace, workers: Workers) -> Iterator[dict]:
    """The records of all methods, on every node."""
    for name, (overrides, steps) in METHODS.items():
        all_overrides = [*COMMON, *overrides, *options.overrides]
        yield {"method": name} | time_training(all_overrides, steps, workers)


def report(records: list[dict]) -> str:
    rows = [["link", "method", "MB per step", "s per step", "waiting", "share", "tokens/s"]]
    for one in records:
        method, waiting = one["method"], min(one["waiting"])
        for old, new in RENAMED.items():
            method = method.replace(old, new)
        rows.append(
            [
                one["rate"],
                modern_label(method),
                f"{one['w2s_bytes'] / 1e6:.3f}",
                f"{one['seconds']:.3f}",
                f"{waiting:.3f}",
                f"{waiting / one['seconds']:.1%}",
                f"{one['tokens'] / one['seconds']:.0f}",
            ]
        )
    delay, placement = records[0]["delay"], records[0]["placement"]
    millions = records[0]["parameters"] / 1e6
    return f"""# Local steps over slow and far links

What they send and what it costs in loss is in [results](../README.md).
`sudo python scripts/local_steps/links.py`: two nodes, network namespaces of one machine, with a
worker of one thread each and {delay} from one to the other (none where the link is unlimited);
{millions:.1f} M parameters, a sequence of 256 tokens per worker and step, servers {placement}. All
rows of a link are of one launch. Waiting is what the rank that waits less did besides computing, in
seconds per step: in the exchange, and for what workers send each other beside it (losses, and
whether to stop). Where every step syncs, the message is the default one, whose encoding is most of
what its steps take longer.

{markdown(rows, text_columns=2)}
"""


def main() -> int:
    if "RANK" in os.environ:
        return job(measure)
    return command(__doc__, LOG, launch, page(report), OPTIONS)


if __name__ == "__main__":
    exit_process(main())
