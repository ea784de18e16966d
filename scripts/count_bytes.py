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

INTERFACES = Path("/sys/class/net")
COUNTERS = ("tx_bytes", "tx_packets", "rx_bytes")
QUIET_SECONDS = 0.2
HEADERS = 14 + 20 + 32  # bytes of a packet that are Ethernet's, IPv4's and TCP's (with timestamps)


def count(run: Run, interface: Path, steps: int) -> dict:
    """Counts, a step: what the log says of this rank and what the kernel says of its node.

    `log_bytes`, `kernel_bytes` and `kernel_packets` are sent, `kernel_received_bytes` received;
    `seconds` is the time of all `steps`.
    """
    run.step()  # the first one makes connections
    dist.barrier()
    before = counters_when_quiet(interface) | {"log": run.optimizer.wire_tx_bytes}
    dist.barrier()  # none starts before all have read
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    dist.barrier()
    seconds = time.perf_counter() - start
    after = counters_when_quiet(interface) | {"log": run.optimizer.wire_tx_bytes}
    log, sent, packets, received = (
        (after[counter] - before[counter]) / steps for counter in ("log", *COUNTERS)
    )
    return {
        "rank": run.workers.rank,
        "log_bytes": log,
        "kernel_bytes": sent,
        "kernel_packets": packets,
        "kernel_received_bytes": received,
        "seconds": seconds,
    }


def counters_when_quiet(interface: Path) -> dict[str, int]:
    """The counters once nothing was sent for a while: sockets have drained, all is acknowledged."""
    last = None
    while (now := read_counters(interface)) != last:
        last = now
        time.sleep(QUIET_SECONDS)
    return now


def read_counters(interface: Path) -> dict[str, int]:
    return {name: int((interface / "statistics" / name).read_text()) for name in COUNTERS}


def of_nodes(ranks: list[dict], ranks_per_node: int) -> list[dict]:
    """Of every node its first rank's counts, with what the log says of all its ranks."""
    firsts = range(0, len(ranks), ranks_per_node)
    nodes = [ranks[first : first + ranks_per_node] for first in firsts]
    return [node[0] | {"log_bytes": sum(rank["log_bytes"] for rank in node)} for node in nodes]


def check_launch(workers: Workers, interface: Path, steps: int) -> None:
    """Raise RunError where the counters would not be those of one node among several."""
    if steps < 1:
        raise RunError(f"--steps={steps} is not allowed: give a whole number of at least 1")
    if workers.count < 2 or workers.count == int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise RunError("several nodes are needed: start with scripts/netns.py")
    if not interface.is_dir():
        names = ", ".join(sorted(os.listdir(INTERFACES)))
        raise RunError(f"--interface={interface.name} is not allowed: choose from {names}")


def count_table(rows: list[dict]) -> str:
    """What ranks sent in MB per step, one line each; the last column leaves headers out."""
    lines = [["server", "rank", "log", "kernel", "difference", "received", "payload alone"]]
    for row in rows:
        log, sent, received = row["log_bytes"], row["kernel_bytes"], row["kernel_received_bytes"]
        payload = sent - HEADERS * row["kernel_packets"]
        lines.append(
            [
                row["server"],
                str(row["rank"]),
                f"{log / 1e6:.3f}",
                f"{sent / 1e6:.3f}",
                f"{sent / log - 1:+.2%}",
                f"{received / 1e6:.3f}",
                f"{payload / log - 1:+.2%}",
            ]
        )
    return table(lines)


def count_all(options: argparse.Namespace, workers: Workers) -> int:
    """Count for every placement of the servers, print the table and write the numbers."""
    interface = INTERFACES / options.interface
    workers.together(lambda: check_launch(workers, interface, options.steps))
    servers = options.servers.split(",") if options.servers else []
    choices = [[f"optimizer.server={server}"] for server in servers] or [[]]
    rows = []
    for choice in choices:
        job = compose((*options.overrides, *choice, f"steps={options.steps + 1}"))
        ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        if job.config.ranks_per_worker != ranks_per_node:
            raise RunError(
                f"ranks_per_worker={job.config.ranks_per_worker} is not the number of ranks "
                f"per node: set it to {ranks_per_node}, so that the log is of what leaves a node"
            )
        run = workers.together(lambda job=job: Run(job.config, workers))
        server = getattr(run.optimizer, "server", "all-reduce")
        own = {"server": server} | count(run, interface, options.steps)
        rows += of_nodes(workers.gather(own), ranks_per_node)
    workers.say(f"MB per step on {workers.count} nodes\n\n{count_table(rows)}")
    if options.json and workers.first:
        facts = {"nodes": workers.count, "interface": options.interface, "steps": options.steps}
        options.json.write_text(json.dumps(facts | {"rows": rows}) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--servers", help="placements, with commas; as configured by default")
    parser.add_argument("--steps", type=int, default=10, help="steps (default %(default)s)")
    parser.add_argument("--interface", default="eth0", help="counted (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_intermixed_args()
    workers = Workers()
    return workers.run(lambda: count_all(options, workers))


if __name__ == "__main__":
    exit_process(main())
