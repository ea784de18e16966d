"""Runs the processes of a worker, and starts them again when they crash.

    python scripts/supervise.py [--ranks 2] [--shutdown-timeout 120] SCRIPT [ARGUMENT ...]

As torchrun does on one machine, with three differences. An error that no restart can mend, by which
a process ends with status 78 (os.EX_CONFIG), ends the worker for good. What ends soon after its
start is started again later and later, and in the end no more. Status 0 means that the work is
complete: a worker that was asked to stop ends with 128 and the number of the signal, as in a shell.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from threading import Event

GRACE = 120.0  # seconds for a worker to end that was asked to
LOST = 30.0  # seconds for the other ranks of a worker to end, once one has crashed
LONG = 60.0  # seconds of life, after which a worker is started again at once
LONGEST_PAUSE = 60.0  # seconds
TRIES = 100  # starts in a row that do not live long, which take 100 minutes
TICK = 0.2  # seconds between looks at the processes


class Request(Event):
    """A request to stop, by SIGINT, SIGTERM or SIGHUP. Under nohup SIGHUP stays ignored."""

    def __init__(self):
        super().__init__()
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        self.number = number
        self.set()

    @property
    def status(self) -> int:
        """The exit status of a process that was asked to stop."""
        return 128 + self.number


def supervise(command: list[str], ranks: int, grace: float) -> int:
    """Run a script by so many ranks until it completes; returns the exit status.

    command: the script and its arguments; grace: seconds for it to end once it is asked to.
    """
    asked, pause, tries = Request(), 0.0, 0
    while True:
        start = time.monotonic()
        statuses = run_once(command, ranks, asked, grace)
        if asked.is_set():
            return asked.status
        if not any(statuses):
            return 0
        if os.EX_CONFIG in statuses:
            return os.EX_CONFIG
        lived = time.monotonic() - start
        pause = 0.0 if lived > LONG else min(2 * pause or 1.0, LONGEST_PAUSE)
        tries = 0 if lived > LONG else tries + 1
        if tries == TRIES:
            _say(f"error: given up: it ended {TRIES} times within {LONG:g} s of its start")
            return 1
        when = f"in {pause:g} s" if pause else "now"
        _say(f"ended with {_first_failure(statuses)} after {lived:.0f} s: starting again {when}")
        if asked.wait(pause):
            return asked.status


def run_once(command: list[str], ranks: int, asked: Event, grace: float) -> list[int]:
    """Start the ranks and wait for their end; returns their exit statuses.

    A crash of one of them, or a request to stop, ends all.
    """
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(ranks):
        own = common | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        arguments = [sys.executable, "-u", *command]
        processes.append(subprocess.Popen(arguments, env=environment, start_new_session=True))
    while None in (statuses := [process.poll() for process in processes]):
        if asked.is_set() or any(statuses):
            _end(processes, asked, grace)
            break
        asked.wait(TICK)
    return [process.returncode for process in processes]


def _end(processes: list[subprocess.Popen], asked: Event, grace: float) -> None:
    """Ask all to stop, and kill those that have not ended in time."""
    for process in processes:
        process.terminate()
    patience = grace if asked.is_set() else min(LOST, grace)
    until = time.monotonic() + patience
    while any(process.poll() is None for process in processes):
        if time.monotonic() > until:
            for process in processes:
                process.kill()
                process.wait()
            _say(
                f"error: killed, since it had not ended {patience:g} s after it was asked to stop: "
                "the next start uses the newest checkpoint; give a longer --shutdown-timeout"
            )
            return
        time.sleep(TICK)


def _first_failure(statuses: list[int]) -> str:
    status = next(filter(None, statuses))
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1, help="processes (%(default)s)")
    ending = "for processes to end that were asked to stop (%(default)s)"
    span = {"type": float, "metavar": "SECONDS", "default": GRACE}
    parser.add_argument("--shutdown-timeout", **span, help=ending)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGUMENT ...]")
    options = parser.parse_args()
    return supervise(options.command, options.ranks, options.shutdown_timeout)


if __name__ == "__main__":
    sys.exit(main())
