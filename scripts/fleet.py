"""Workers that come and go: start them, and the lighthouse that knows who is there.

On one machine, all at once (`make fleet NPROC=3`):

    python scripts/fleet.py start --workers 3 [KEY=VALUE ...]

On several, the lighthouse on one of them, and a worker on each, with the same overrides:

    python scripts/fleet.py lighthouse --workers 3
    python scripts/fleet.py worker --number 0 --workers 3 --lighthouse http://FIRST:29510 [...]

A worker is a torchrun of its own (`--ranks` processes), which starts it again whenever it ends
before the training does; it goes on from where the others are. The lighthouse asks for a majority,
so that no two parts of the fleet train apart. No timeout has to be chosen: a worker is gone when it
was not heard of for 5 seconds, and one that hangs ends itself, by the times of its own steps.

A worker listens on ports of the system's choice, the lighthouse on 29510, and others have to reach
both. State goes from worker to worker unencrypted and is unpickled: trust the network.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.config import compose
from training.data import share_of_batch
from training.workers import RunError

ROOT = Path(__file__).resolve().parent.parent
PORT = 29510
HEARTBEAT_SECONDS = 5  # without one a worker is gone
JOIN_SECONDS = 24 * 3600  # for a worker that lives and is on its way; one that hangs ends itself
AFTER_THE_FIRST = 120  # seconds for workers to end once one has completed


def new_lighthouse(workers: int, port: int):
    """A server that asks for a majority of the workers."""
    os.environ.setdefault("RUST_LOG", "warn")  # or it says several lines a round
    from torchft.coordination import LighthouseServer

    return LighthouseServer(
        bind=f"[::]:{port}",
        min_replicas=workers // 2 + 1,
        join_timeout_ms=1000 * JOIN_SECONDS,
        heartbeat_timeout_ms=1000 * HEARTBEAT_SECONDS,
        quorum_tick_ms=20,
    )


def worker_overrides(options: argparse.Namespace, number: int) -> list[str]:
    """Of train.py, for a worker."""
    told = ["membership=torchft", f"membership.workers={options.workers}"]
    told += [f"membership.worker={number}", f"membership.lighthouse={options.lighthouse}"]
    told += [f"worker_size={options.ranks}"] if options.ranks > 1 else []
    return [*told, *options.overrides]


def worker_command(options: argparse.Namespace, number: int, *script: str) -> list[str]:
    """torchrun of a worker, of train.py or of a script that is called as it is."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    launch += ["--max-restarts=1000", "--monitor-interval=0.2"]
    script = script or (str(ROOT / "train.py"),)
    return [sys.executable, "-m", *launch, *script, *worker_overrides(options, number)]


def start(options: argparse.Namespace) -> int:
    """The lighthouse and all workers on this machine; returns the exit status."""
    options.lighthouse = f"http://localhost:{options.port}"
    server = new_lighthouse(options.workers, options.port)
    workers = [
        subprocess.Popen(worker_command(options, number), start_new_session=True)
        for number in range(options.workers)
    ]
    asked = _asked_to_stop()
    until = None
    while any(worker.poll() is None for worker in workers) and not asked.wait(0.5):
        if until is None and any(worker.poll() == 0 for worker in workers):
            until = time.monotonic() + AFTER_THE_FIRST
        if until is not None and time.monotonic() > until:
            break
    for worker in workers:
        worker.terminate()  # those that are left
    states = [worker.wait() for worker in workers]
    server.shutdown()
    for number, status in enumerate(states):
        if status and not asked.is_set():
            print(f"error: worker {number} did not complete: see its log", file=sys.stderr)
    return 1 if any(states) and not asked.is_set() else 0


def serve(options: argparse.Namespace) -> int:
    """The lighthouse alone, until it is asked to stop."""
    server = new_lighthouse(options.workers, options.port)
    print(f"lighthouse on port {options.port}, for {options.workers} workers", flush=True)
    _asked_to_stop().wait()
    server.shutdown()
    return 0


def work(options: argparse.Namespace) -> int:
    """A worker, in place of this process."""
    command = worker_command(options, options.number)
    os.execv(command[0], command)


def _asked_to_stop() -> Event:
    """Set by SIGINT and SIGTERM."""
    asked = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--workers", type=int, required=True, help="that there may be at once")
    port = argparse.ArgumentParser(add_help=False)
    port.add_argument("--port", type=int, default=PORT, help="of the lighthouse (%(default)s)")
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--ranks", type=int, default=1, help="processes of a worker")
    training.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parts.add_parser("start", parents=[common, port, training]).set_defaults(do=start)
    parts.add_parser("lighthouse", parents=[common, port]).set_defaults(do=serve)
    worker = parts.add_parser("worker", parents=[common, training])
    worker.add_argument("--number", type=int, required=True, help="of this worker, from 0")
    worker.add_argument("--lighthouse", required=True, metavar="URL")
    worker.set_defaults(do=work)
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun has it for several processes
    if options.workers < 1:
        parser.error(f"--workers {options.workers} is not allowed: give at least 1")
    if "overrides" in options:
        options.lighthouse = getattr(options, "lighthouse", "http://localhost")
        try:  # before anything starts, and is started again and again
            job = compose(tuple(worker_overrides(options, getattr(options, "number", 0))))
            share_of_batch(job.config, options.workers * options.ranks)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return options.do(options)


if __name__ == "__main__":
    sys.exit(main())
