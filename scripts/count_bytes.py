"""Count what training steps send: by the optimizer's log, and by the kernel's interface counters.

    python scripts/netns.py --nodes 2 scripts/count_bytes.py [--servers rank0,sharded] [KEY=VALUE]

Takes the overrides of train.py. Every node is a worker, of one rank or, with ranks_per_worker, of
several, and has one interface for nothing but the job.
The kernel counts whole frames: payload, headers, retransmissions, and the acknowledgements of what
the rank received. Its counters are read while the links are quiet; what they see besides the steps
are two barriers and the heartbeat of torchrun, some kilobytes in all.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import Run
from training.config import compose
from training.report import table
from training.workers import RunError, Workers, exit_process

INTERFACE = Path("/sys/class/net/eth0")
COUNTERS = ("tx_bytes", "tx_packets", "rx_bytes")
QUIET_SECONDS = 0.2
HEADERS = 14 + 20 + 32  # bytes of a packet that are Ethernet's, IPv4's and TCP's (with timestamps)


def count(run: Run, steps: int) -> dict:
    """Counts per step: what the log says of this rank and what the kernel says of its node.

    `log_bytes`, `kernel_bytes` and `kernel_packets` are sent, `kernel_received_bytes` received;
    `seconds` is the time of all `steps`.
    """
    run.step()  # the first one makes connections
    dist.barrier()
    before = [run.optimizer.wire_tx_bytes, *counters_when_quiet()]
    dist.barrier()  # none starts before all have read
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    dist.barrier()
    seconds = time.perf_counter() - start
    after = [run.optimizer.wire_tx_bytes, *counters_when_quiet()]
    names = ("log_bytes", "kernel_bytes", "kernel_packets", "kernel_received_bytes")
    counts = [(end - start) / steps for start, end in zip(before, after, strict=True)]
    return {"rank": run.workers.rank, "seconds": seconds} | dict(zip(names, counts, strict=True))


def counters_when_quiet() -> list[int]:
    """The counters once nothing was sent for a while: sockets have drained, all is acknowledged."""
    last = None
    while (now := read_counters()) != last:
        last = now
        time.sleep(QUIET_SECONDS)
    return now


def read_counters() -> list[int]:
    return [int((INTERFACE / "statistics" / name).read_text()) for name in COUNTERS]


def check_launch(ranks_per_worker: int, steps: int, workers: Workers) -> None:
    """Raise RunError where the counters would not be those of one node among several."""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if steps < 1:
        raise RunError(f"--steps={steps} is not allowed: give a whole number of at least 1")
    if workers.count < 2 or workers.count == ranks_per_node:
        raise RunError("several nodes are needed: start with scripts/netns.py")
    if not INTERFACE.is_dir():
        raise RunError(f"{INTERFACE} is not there to count: start with scripts/netns.py")
    if ranks_per_worker != ranks_per_node:
        raise RunError(
            f"ranks_per_worker={ranks_per_worker} is not the number of ranks per node: set it to "
            f"{ranks_per_node}, so that the log is of what leaves a node"
        )


def count_table(rows: list[dict]) -> str:
    """What ranks sent in MB per step, one line each; the last column leaves headers out."""
    lines = [["server", "rank", "log", "kernel", "difference", "received", "payload alone"]]
    for row in rows:
        log, sent, received = row["log_bytes"], row["kernel_bytes"], row["kernel_received_bytes"]
        payload = sent - HEADERS * row["kernel_packets"]
        bytes_sent = [f"{log / 1e6:.3f}", f"{sent / 1e6:.3f}", f"{sent / log - 1:+.2%}"]
        others = [f"{received / 1e6:.3f}", f"{payload / log - 1:+.2%}"]
        lines.append([row["server"], str(row["rank"]), *bytes_sent, *others])
    return table(lines)


def count_all(options: argparse.Namespace, workers: Workers) -> int:
    """Count for every placement of the servers, print the table and write the numbers."""
    rows = []
    for server in options.servers.split(",") if options.servers else [None]:
        choice = [f"optimizer.server={server}"] if server else []
        config = compose((*options.overrides, *choice, f"steps={options.steps + 1}")).config
        workers.together(
            lambda config=config: check_launch(config.ranks_per_worker, options.steps, workers)
        )
        run = workers.together(lambda config=config: Run(config, workers))
        own = {"server": getattr(run.optimizer, "server", "all-reduce")}
        by_rank = workers.gather(own | count(run, options.steps))
        for first in range(0, workers.count, config.ranks_per_worker):  # of a node
            of_node = by_rank[first : first + config.ranks_per_worker]
            rows.append(of_node[0] | {"log_bytes": sum(rank["log_bytes"] for rank in of_node)})
    workers.say(f"MB per step on {workers.count} nodes\n\n{count_table(rows)}")
    if options.json and workers.first:
        facts = {"nodes": workers.count, "steps": options.steps}
        options.json.write_text(json.dumps(facts | {"rows": rows}) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--servers", help="placements, with commas; as configured by default")
    parser.add_argument("--steps", type=int, default=10, help="steps (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_intermixed_args()
    workers = Workers()
    return workers.run(lambda: count_all(options, workers))


if __name__ == "__main__":
    exit_process(main())
