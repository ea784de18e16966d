"""Time a step of settings of the study over slow and far links.

    sudo python scripts/probes/network.py [--steps 12] [--repeats 1] [--only NAME ...]

Two nodes are network namespaces (scripts/netns.py; root on Linux, iproute2, /dev/net/tun), a worker
of one thread each, 50 ms from one another. Every setting is trained for some steps of whole rounds
at every rate, then without a limit and a delay, and so on for every repeat; the mean time of a step
is added to results/probes/network.jsonl; the page takes their medians. EF21-Muon is timed
with its servers on every rank, where nothing is sent back: placements take the same steps bit for
bit, so the study's losses are theirs too.
"""

import argparse
import json
import os
import sys
from math import ceil
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.measuring import WARM_UP, time_steps
from scripts.netns import Network, requirements_missing
from scripts.probes.times import LINKS, UNLIMITED
from scripts.shakespeare.runs import SETTINGS
from train import Run
from training.config import compose
from training.workers import Workers, exit_process

LOG = Path(__file__).resolve().parents[2] / "results" / "probes" / "network.jsonl"
DELAY = "50ms"
TIMED = (
    *("identity", "muon", "powersgd16", "muloco", "served6", "rank40-int5"),
    *(f"local{every}-signs" for every in (4, 10, 30, 60)),
    *("local4-signs-message", "local120-60-signs-message"),  # of the headline
)


def overrides(name: str) -> tuple[str, ...]:
    """The setting's own, with the servers where nothing is sent back."""
    own = SETTINGS[name].overrides.split()
    ours = not any(override.startswith("optimizer=") for override in own)
    placement = ("optimizer.server=replicated",) if ours else ()
    return ("experiment=shakespeare", *own, *placement)


def job(options: argparse.Namespace, workers: Workers) -> int:
    """On every node: time all settings; rank 0 writes them."""
    for name in options.only:
        run = Run(compose(overrides(name)).config, workers)
        for _ in range(WARM_UP):
            run.step()
        round_steps = max(run.optimizer.rounds.lengths)
        seconds, sent = time_steps(run, round_steps * ceil(options.steps / round_steps))
        record = {"rate": options.rate, "name": name, "seconds": seconds, "bytes": sent}
        workers.say(f"{options.rate:>8}  {name:<24} {seconds:.3f} s per step")
        if workers.first:
            with options.to.open("a") as log:
                log.write(json.dumps(record) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", help=argparse.SUPPRESS)  # of this process's link
    parser.add_argument("--steps", type=int, default=12, help="timed steps (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="of all (default %(default)s)")
    parser.add_argument("--rates", nargs="+", choices=LINKS, default=LINKS, metavar="RATE")
    parser.add_argument("--only", nargs="+", choices=TIMED, default=TIMED, metavar="NAME")
    parser.add_argument("--to", type=Path, default=LOG, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        workers = Workers()
        return workers.run(lambda: job(options, workers))
    if missing := requirements_missing():
        print(f"error: {missing}", file=sys.stderr)
        return 1
    try:
        measure(options)
    except (RuntimeError, OSError) as error:  # of what the system refuses
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(options: argparse.Namespace) -> None:
    """At every rate asked for and then without a network, as often as asked."""
    rates = [rate for rate in options.rates if rate != UNLIMITED]
    for rate in options.repeats * [*rates, UNLIMITED]:
        own = [f"--rate={rate}", f"--steps={options.steps}", f"--to={options.to.resolve()}"]
        own += ["--only", *options.only]
        limits = (None, None) if rate == UNLIMITED else (rate, DELAY)
        with Network(2, *limits) as network:
            network.torchrun(__file__, *own, show=True, timeout=1200)


if __name__ == "__main__":
    exit_process(main())
