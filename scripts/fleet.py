"""Workers that come and go: start them, and the lighthouse that knows who is there.

On one machine, all at once (`make fleet NPROC=3`):

    python scripts/fleet.py start --workers 3 [KEY=VALUE ...]

On several, the lighthouse on one of them, and a worker on each, with the same overrides:

    python scripts/fleet.py lighthouse --workers 3
    python scripts/fleet.py worker --number 0 --workers 3 --lighthouse http://FIRST:29510 [...]

A worker is `--ranks` processes, which scripts/supervise.py starts again when they crash; it resumes
from where the others are. What no restart can mend, as a wrong configuration, ends it for good. The
lighthouse asks for a majority, so that no two parts of the fleet train apart. No timeout has to be
chosen: a worker is gone when it was not heard of for 5 seconds, and one that hangs ends itself, by
the times of its own steps.

A worker listens on ports of the system's choice, the lighthouse on 29510, and others have to reach
both. State goes from worker to worker unencrypted and is unpickled: trust the network.
"""

import argparse
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from scripts.console import Console
from scripts.supervise import GRACE, Request
from training.arguments import Parser, seconds
from training.config import compose, flat
from training.data import share_of_batch
from training.membership import require_addresses
from training.workers import FINAL, RunError, one_line

ROOT = Path(__file__).resolve().parent.parent
PORT = 29510
HEARTBEAT_SECONDS = 5  # without one a worker is gone
JOIN_SECONDS = 24 * 3600  # for a worker that lives and is on its way; one that hangs ends itself
AFTER_THE_FIRST = 120  # seconds for workers to end once one has completed
OF_TOO_FEW = 10  # seconds for workers to end by themselves where fewer than a majority are left
TICK = 0.5  # seconds between looks at the workers
RESOLVER_SECONDS = 5.0  # for it to answer, before workers start


def majority(workers: int) -> int:
    """The least number of workers that may continue without the others."""
    return workers // 2 + 1


def new_lighthouse(workers: int, port: int):
    """A server that asks for a majority of the workers.

    Raises RunError where there is no torchft, and for a port that cannot be used.
    """
    os.environ.setdefault("RUST_LOG", "warn")  # or it says several lines per round
    try:
        from torchft.coordination import LighthouseServer
    except ImportError as error:
        raise RunError(
            f"a lighthouse needs torchft ({one_line(error)}): pip install 'ef21-muon[fleet]', on "
            "Linux on x86-64 with Python 3.13 or older"
        ) from error
    everywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
    try:
        return LighthouseServer(
            bind=f"{everywhere}:{port}",
            min_replicas=majority(workers),
            join_timeout_ms=1000 * JOIN_SECONDS,
            heartbeat_timeout_ms=1000 * HEARTBEAT_SECONDS,
            quorum_tick_ms=20,
        )
    except RuntimeError as error:
        raise RunError(
            f"the lighthouse cannot have port {port} ({one_line(error)}): give a free one with "
            "--port, or end what has it"
        ) from error


def worker_overrides(options: argparse.Namespace, number: int) -> list[str]:
    """Of train.py, for a worker."""
    own = ["membership=torchft", f"membership.workers={options.workers}"]
    own += [f"membership.worker={number}", f"membership.lighthouse={options.lighthouse}"]
    own += [f"ranks_per_worker={options.ranks}"] if options.ranks > 1 else []
    return [*own, *options.overrides]


def worker_command(options: argparse.Namespace, number: int, *script: str) -> list[str]:
    """What runs a worker, by train.py or by a script that is called as it is."""
    launch = [str(ROOT / "scripts" / "supervise.py"), f"--ranks={options.ranks}"]
    launch += [f"--shutdown-timeout={options.shutdown_timeout:g}"]
    script = script or (str(ROOT / "train.py"),)
    script += () if options.timeout is None else (f"--timeout={options.timeout:g}",)
    return [sys.executable, *launch, *script, *worker_overrides(options, number)]


def start(options: argparse.Namespace) -> int:
    """The lighthouse and all workers on this machine; returns the exit status."""
    server = new_lighthouse(options.workers, options.port)
    asked, console, workers = Request(), Console(options.workers), []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for number in range(options.workers):
        command = worker_command(options, number)
        workers.append(subprocess.Popen(command, start_new_session=True, **pipes))
        console.follow(number, workers[-1])
    too_few = _wait(workers, asked, console)
    for worker in workers:
        worker.terminate()  # those that are left
    statuses = [worker.wait() for worker in workers]
    console.close()
    if 0 in statuses:  # the result
        console.let_speak(statuses.index(0))
    server.shutdown()
    if asked.is_set():
        return asked.status
    if too_few:
        print("error: fewer than a majority of the workers are left: all stop", file=sys.stderr)
        return 1
    for number, status in enumerate(statuses):
        if status not in (0, FINAL):  # which has said why
            print(f"error: worker {number} did not complete: see its log", file=sys.stderr)
    return statuses[0] if set(statuses) in ({0}, {FINAL}) else 1


def _wait(workers: list[subprocess.Popen], asked: Request, console: Console) -> bool:
    """Wait for workers to end, or for a request to stop; whether some wait in vain for a majority.

    One that ends with another status than 0 has ended for good, as scripts/supervise.py has it.
    """
    until = math.inf
    while any(worker.poll() is None for worker in workers) and not asked.wait(TICK):
        statuses = [worker.poll() for worker in workers]
        hopeful = [number for number, status in enumerate(statuses) if not status]
        if hopeful:
            console.let_speak(hopeful[0])
        too_few = len(hopeful) < majority(len(workers))
        if until == math.inf and (too_few or 0 in statuses):
            until = time.monotonic() + (OF_TOO_FEW if too_few else AFTER_THE_FIRST)
        if time.monotonic() > until:
            return too_few
    return False


def serve(options: argparse.Namespace) -> int:
    """The lighthouse alone, until it is asked to stop."""
    server, asked = new_lighthouse(options.workers, options.port), Request()
    print(f"lighthouse on port {options.port}, for {options.workers} workers", flush=True)
    asked.wait()
    server.shutdown()
    return 0


def work(options: argparse.Namespace) -> int:
    """A worker, in place of this process."""
    command = worker_command(options, options.number)
    os.execv(command[0], command)


PARTS = {"start": start, "lighthouse": serve, "worker": work}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises RunError for one that cannot be read."""
    prog = "scripts/fleet.py"
    parser = Parser(
        prog=prog,
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"{prog} start --help, and so on, list the options of each",
    )
    parser.add_argument("part", choices=PARTS, help="what to start; options come after it")
    part = parser.parse_args(arguments[:1]).part
    parser = Parser(prog=f"{prog} {part}", description=PARTS[part].__doc__)
    add = parser.add_argument
    add("--workers", type=whole(1), required=True, help="that there may be at once")
    if part == "worker":
        add("--number", type=int, required=True, help="of this worker, from 0")
        add("--lighthouse", required=True, metavar="URL")
    else:
        port = whole(1, 2**16 - 1)
        add("--port", type=port, default=PORT, help="of the lighthouse (%(default)s)")
    if part != "lighthouse":
        ending = "for a worker to end that was asked to stop (%(default)g)"
        span = {"type": seconds, "metavar": "SECONDS"}
        add("--ranks", type=whole(1), default=1, help="processes of a worker (%(default)s)")
        add("--timeout", **span, help="as that of train.py (600)")
        add("--shutdown-timeout", **span, default=GRACE, help=ending)
        add("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    options = parser.parse_intermixed_args(arguments[1:])
    if part == "start":
        options.lighthouse = f"http://localhost:{options.port}"
    return argparse.Namespace(part=part, **vars(options))


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A type of arguments: a whole number within bounds."""
    allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            message = f"{text} is not allowed: give a whole number of {allowed}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return read


def _check(options: argparse.Namespace) -> None:
    """Raise RunError for a configuration with which workers cannot start."""
    _require_accord(options)
    job = compose(tuple(worker_overrides(options, getattr(options, "number", 0))))
    share_of_batch(job.config, options.workers * options.ranks)
    require_addresses(job.config.membership, RESOLVER_SECONDS)


def _require_accord(options: argparse.Namespace) -> None:
    """Raise RunError for an override of what the options of this script say, or the script does."""
    start = options.part == "start"
    number = "each its own" if start else options.number
    said = {  # the value that there is, and the option for another
        "membership": ("torchft", None),
        "membership.name": ("torchft", None),
        "membership.workers": (options.workers, "--workers"),
        "membership.worker": (number, None if start else "--number"),
        "membership.lighthouse": (options.lighthouse, None if start else "--lighthouse"),
        "ranks_per_worker": (options.ranks, "--ranks"),
    }
    try:
        parsed = OverridesParser.create().parse_overrides(options.overrides)
    except HydraException:  # which has a line of its own, from those who compose
        return
    for one in parsed:
        given = None if one.is_delete() else one.value()
        for key, value in flat({one.key_or_group: given}).items():
            if key in said and str(value) != str(said[key][0]):
                option = said[key][1] if isinstance(value, int | str) and value != "" else None
                instead = f"give {option} {value}" if option else "leave it out"
                raise RunError(f"{one.input_line} is not allowed here: {instead}")


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun has it for several processes
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        if options.part != "lighthouse":
            _check(options)
        return PARTS[options.part](options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return FINAL


if __name__ == "__main__":
    sys.exit(main())
