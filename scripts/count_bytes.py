"""Count what training steps send: by the optimizer's log, and by the kernel's interface counters.

    python scripts/netns.py --nodes 2 scripts/count_bytes.py [--servers rank0,sharded] [KEY=VALUE]

Takes the overrides of train.py. Every node is a worker, of one rank or, with ranks_per_worker, of
several, and has one interface for nothing but the job. The kernel counts whole frames: payload,
headers, retransmissions, and the acknowledgements of what the rank received. Its counters are read
while the links are quiet; what they see besides the steps are two barriers and the heartbeat of
torchrun, some kilobytes in all. Prints a table and writes runs/count_bytes/count.jsonl.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.measuring import by_ranks
from scripts.studies import OVERRIDES, command
from train import Run
from training.config import ROOT, compose
from training.report import table
from training.workers import RunError, Workers, exit_process

LOG = ROOT / "runs" / "count_bytes" / "count.jsonl"
OPTIONS = {
    **OVERRIDES,
    "--servers": {"default": "", "help": "placements, with commas; as configured by default"},
    "--steps": {"type": int, "default": 10, "help": "counted steps"},
}
INTERFACE = Path("/sys/class/net/eth0")
COUNTERS = [INTERFACE / "statistics" / name for name in ("tx_bytes", "tx_packets")]
COUNTED = ("log_bytes", "kernel_bytes", "kernel_packets")
QUIET_SECONDS = 0.2
HEADERS = 14 + 20 + 32  # bytes of a packet that are Ethernet's, IPv4's and TCP's (with timestamps)


def measure(options: argparse.Namespace, workers: Workers) -> Iterator[dict]:
    """Of every placement and node, COUNTED."""
    for server in options.servers.split(","):
        choice = [f"optimizer.server={server}"] if server else []
        config = compose((*options.overrides, *choice, f"steps={options.steps + 1}")).config
        ranks = config.ranks_per_worker
        workers.together(lambda ranks=ranks: check_launch(ranks, options.steps, workers))
        run = Run(config, workers)
        own = {"server": getattr(run.optimizer, "server", "all-reduce"), "rank": workers.rank}
        by_rank = workers.gather(own | count(run, options.steps))
        for first in range(0, workers.count, ranks):  # of a node
            log_bytes = sum(one["log_bytes"] for one in by_rank[first : first + ranks])
            yield by_rank[first] | {"log_bytes": log_bytes}


def check_launch(ranks_per_worker: int, steps: int, workers: Workers) -> None:
    """Raise RunError where the counters would not be those of one node among several."""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if steps < 1:
        raise RunError(f"--steps={steps} is not allowed: give a whole number of at least 1")
    if workers.count in (1, ranks_per_node) or not INTERFACE.is_dir():
        raise RunError("several nodes are needed: start with scripts/netns.py")
    if ranks_per_worker != ranks_per_node:
        raise RunError(
            f"ranks_per_worker={ranks_per_worker} is not the number of ranks per node: set it to "
            f"{ranks_per_node}, so that the log is of what leaves a node"
        )


def count(run: Run, steps: int) -> dict[str, float]:
    """COUNTED, sent per step: what the log says of this rank and what the kernel of its node."""
    run.step()  # the first one makes connections
    dist.barrier()
    before = sent_when_quiet(run)
    dist.barrier()  # none starts before all have read
    for _ in range(steps):
        run.step()
    dist.barrier()
    sent = zip(COUNTED, before, sent_when_quiet(run), strict=True)
    return {name: (end - start) / steps for name, start, end in sent}


def sent_when_quiet(run: Run) -> list[int]:
    """COUNTED, once nothing was sent for a while: sockets have drained, all is acknowledged."""
    now, last = [], None
    while now != last:
        time.sleep(QUIET_SECONDS)
        now, last = [int(path.read_text()) for path in COUNTERS], now
    return [run.optimizer.wire_tx_bytes, *now]


def report(records: list[dict], folder: Path) -> str:
    """What nodes send in MB per step, one line each; the last column leaves headers out."""
    lines = [["server", "rank", "log", "kernel", "difference", "payload alone"]]
    for one in records:
        log, sent = one["log_bytes"], one["kernel_bytes"]
        payload = sent - HEADERS * one["kernel_packets"]
        megabytes = f"{log / 1e6:.3f}", f"{sent / 1e6:.3f}"
        more = f"{sent / log - 1:+.2%}", f"{payload / log - 1:+.2%}"
        lines.append([one["server"], str(one["rank"]), *megabytes, *more])
    return f"MB per step\n\n{table(lines)}"


if __name__ == "__main__":
    exit_process(command(__doc__ or "", LOG, by_ranks(measure), report, OPTIONS))
