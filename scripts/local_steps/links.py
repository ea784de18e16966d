"""Local steps over slow and far links, beside a sync every step: how long training waits.

    python scripts/local_steps/links.py [--rates 10mbit,100mbit,1gbit] [--delay 50ms] [KEY=VALUE]
    python scripts/local_steps/links.py --redraw

Needs root on Linux, iproute2 and /dev/net/tun (scripts/netns.py). For every rate one launch of two
nodes with a worker of one thread each trains with all METHODS, one after the other, as train.py
does; then without a limit and a delay. Timed are as many steps as a round has. Writes
results/local_steps/links.jsonl and README.md beside it, which --redraw makes of it anew.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.netns import Network, requirements_missing
from train import Run
from training.checkpoint import Checkpoints
from training.config import ROOT, compose
from training.log import NoLog
from training.renamed import modern_label
from training.workers import Workers, exit_process

LINKS = ROOT / "results" / "local_steps" / "links.jsonl"
NODES = 2
UNLIMITED = "unlimited"
EVERY = 30
MODEL = "model.width=448 model.heads=4 batch.micro_size=1 batch.global_size=2 schedule.cooldown=0"
UNDISTURBED = "checkpoint.every=0 check_every=0 eval.every=1000 eval.tokens=256 log_every=5"
LOCAL = f"optimizer=local optimizer.sync_every={EVERY}"
WARM_UP = 5
METHODS = {  # overrides, and how many steps are timed
    "sync every step": ("optimizer=ef21_muon", 10),
    f"sync every {EVERY}": (LOCAL, EVERY),
    f"sync every {EVERY}, streaming": (f"{LOCAL} optimizer.streaming=true", EVERY),
    f"sync every {EVERY}, sync delay 2": (f"{LOCAL} optimizer.sync_delay=2", EVERY),
    f"sync every {EVERY}, streaming, sync delay 2":
        (f"{LOCAL} optimizer.streaming=true optimizer.sync_delay=2", EVERY),
}  # fmt: skip

# Of earlier records; the rest as labels of runs.
RENAMED = {"a message a step": "sync every step", "stagger": "streaming"}


class Records(NoLog):
    """In place of a run's log, on every rank: the train records by step."""

    def __init__(self):
        self.of_step = {}

    def train(self, record: dict) -> None:
        self.of_step[record["step"]] = record


def time_training(overrides: list[str], steps: int, workers: Workers) -> dict:
    """Of the steps after WARM_UP, a step: seconds, bytes, tokens, and the waiting of every rank.

    Training waits in the exchange, and for what else workers send each other, which is in no phase.
    """
    last = WARM_UP + steps
    run = Run(compose((*overrides, f"steps={last + 1}")).config, workers)
    records = Records()
    run.train(records, Checkpoints(Path(), workers, keep=1, asynchronous=False))
    start, end = records.of_step[WARM_UP], records.of_step[last]
    seconds = end["seconds"] - start["seconds"]
    phases = {phase: end["phases"][phase] - start["phases"][phase] for phase in end["phases"]}
    working = sum(phases.values()) - phases["exchange"]
    return {
        "seconds": seconds / steps,
        "waiting": workers.gather((seconds - working) / steps),
        "w2s_bytes": (end["w2s_bytes"] - start["w2s_bytes"]) / steps,
        "wire_tx_bytes": (end["wire_tx_bytes"] - start["wire_tx_bytes"]) / steps,
        "tokens": (end["tokens"] - start["tokens"]) / steps,
        "placement": run.optimizer.server,
        "parameters": run.raw_model.config.parameter_count,
    }


def job(options: argparse.Namespace, workers: Workers) -> int:
    """On every node: train with all methods; rank 0 writes what was timed."""
    for name, (overrides, steps) in METHODS.items():
        all_overrides = [
            *MODEL.split(),
            *UNDISTURBED.split(),
            *overrides.split(),
            *options.overrides,
        ]
        record = {"rate": options.rates, "delay": options.delay, "method": name}
        record |= time_training(all_overrides, steps, workers)
        workers.say(json.dumps(record))
        if workers.first:
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    return 0


def report() -> str:
    """README.md, of links.jsonl."""
    records = [json.loads(line) for line in LINKS.read_text().splitlines()]
    for record in records:
        for old, new in RENAMED.items():
            record["method"] = modern_label(record["method"].replace(old, new))
    lines = ["| link | method | MB per step | s per step | waiting | share | tokens/s |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {r['rate']} | {r['method']} | {r['w2s_bytes'] / 1e6:.3f} | {r['seconds']:.3f} | "
        f"{min(r['waiting']):.3f} | {min(r['waiting']) / r['seconds']:.1%} | "
        f"{r['tokens'] / r['seconds']:.0f} |"
        for r in records
    ]
    millions, placement = records[0]["parameters"] / 1e6, records[0]["placement"]
    delay = next(record["delay"] for record in records if record["rate"] != UNLIMITED)
    return f"""# Local steps over slow and far links

What they send and what it costs in loss is in [results](../README.md).
`sudo python scripts/local_steps/links.py`: two nodes, network namespaces of one machine, with a
worker of one thread each and {delay} from one to the other (none where the link is unlimited);
{millions:.1f} M parameters, a sequence of 256 tokens per worker and step, servers {placement}. All
rows of a link are of one launch. Waiting is what the rank that waits less did besides computing, in
seconds per step: in the exchange, and for what workers send each other beside it (losses, and
whether to stop). Where every step syncs, the message is the default one, whose encoding is most of
what its steps take longer.

{chr(10).join(lines)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--rates", default="10mbit,100mbit,1gbit", help="(default %(default)s)")
    parser.add_argument("--delay", default="50ms", help="one way (default %(default)s)")
    parser.add_argument("--out", type=Path, default=LINKS, help="file (default %(default)s)")
    parser.add_argument("--redraw", action="store_true", help="write README.md and measure nothing")
    options = parser.parse_intermixed_args()
    if "RANK" in os.environ:
        workers = Workers()
        return workers.run(lambda: job(options, workers))
    if options.redraw:
        return write_report()
    if missing := requirements_missing():
        print(f"error: {missing}", file=sys.stderr)
        return 1
    options.out.unlink(missing_ok=True)
    for rate in (*options.rates.split(","), UNLIMITED):
        limits = {} if rate == UNLIMITED else {"rate": rate, "delay": options.delay}
        own = [f"--rates={rate}", f"--delay={options.delay}", f"--out={options.out.resolve()}"]
        with Network(NODES, **limits) as network:
            network.torchrun(__file__, *own, *options.overrides, show=True, timeout=3600)
    return write_report() if options.out == LINKS else 0


def write_report() -> int:
    LINKS.with_name("README.md").write_text(report())
    return 0


if __name__ == "__main__":
    exit_process(main())
