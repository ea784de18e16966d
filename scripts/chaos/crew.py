"""A fleet on this machine, whose workers and lighthouse can be ended and started one by one."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from scripts.fleet import GRACE, ROOT, worker_command
from scripts.netns import Network
from training.log import completed
from training.records import LOG_NAME

WORKER = Path(__file__).with_name("worker.py")
FLEET = ROOT / "scripts" / "fleet.py"
TAIL = 1 << 14  # bytes of a log, with its newest records
STARTING = 180  # seconds, at most, until a worker is there again


class Crew:
    """`workers` of a run in `directory`, whose steps take at least `pace` seconds.

    What they print goes to files in the directory. With a network each is on a node of its own, the
    lighthouse on the first one's.
    """

    def __init__(
        self,
        workers: int,
        port: int,
        directory: Path,
        overrides: list[str],
        pace: float,
        network: Network | None = None,
        ranks: int = 1,
    ):
        self.directory, self.pace, self.port, self.network = directory, pace, port, network
        first = network.addresses[0] if network else "localhost"
        self.options = argparse.Namespace(
            workers=workers,
            ranks=ranks,
            timeout=None,
            shutdown_timeout=GRACE,
            lighthouse=f"http://{first}:{port}",
            overrides=[*overrides, f"directory={directory}"],
        )
        self.jobs: dict[int, subprocess.Popen] = {}
        self.start_lighthouse()
        for worker in range(workers):
            self.start(worker)

    def start(self, worker: int) -> None:
        command = worker_command(self.options, worker, str(WORKER), str(self.pace))
        if self.network:
            command.append(f"membership.host={self.network.addresses[worker]}")
        self.jobs[worker] = self._start(command, f"worker{worker}.txt", worker)

    def start_lighthouse(self) -> None:
        options = ["lighthouse", "--workers", str(self.options.workers), "--port", str(self.port)]
        self.lighthouse = self._start([sys.executable, str(FLEET), *options], "lighthouse.txt", 0)

    def _start(self, command: list[str], output: str, node: int) -> subprocess.Popen:
        self.directory.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if self.network:
            env["GLOO_SOCKET_IFNAME"] = "eth0"
            command = ["ip", "netns", "exec", self.network.names[node], *command]
        with (self.directory / output).open("a") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, env=env, cwd=ROOT, start_new_session=True
            )

    def send(self, worker: int, number: signal.Signals) -> None:
        """To the worker's process, not to what starts it again."""
        for child in self.children(worker):
            os.kill(child, number)

    def end(self, worker: int, number: signal.Signals) -> None:
        """The worker and what starts it again; returns when both are gone."""
        job, ranks = self.jobs[worker], self.children(worker)
        if number == signal.SIGKILL:
            job.kill()  # first, or it starts the worker again
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, number)
        job.wait()

    def end_lighthouse(self) -> None:
        self.lighthouse.kill()
        self.lighthouse.wait()

    def close(self) -> None:
        """End all that is left."""
        for worker in self.jobs:
            self.end(worker, signal.SIGKILL)
        self.end_lighthouse()

    def children(self, worker: int) -> list[int]:
        """The processes of its ranks."""
        pid = self.jobs[worker].pid
        path = Path(f"/proc/{pid}/task/{pid}/children")
        return [int(text) for text in path.read_text().split()] if path.exists() else []

    def records(self, worker: int) -> list[dict]:
        """Of its log, whole ones."""
        return _records(self._log(worker).read_text()) if self._log(worker).exists() else []

    def last_step(self) -> int:
        """Of the newest round of any worker."""
        return max((one["step"] or 0 for one in map(self._last, self.jobs) if one), default=0)

    def is_done(self) -> bool:
        """Whether a worker has completed the run."""
        return any(completed(self.directory / f"worker{one}") for one in self.jobs)

    def wait_until_all_meet(self, step: int) -> bool:
        """Wait for a round, with that step or later, that has messages of all workers.

        Returns False if the run ends first. Raises RuntimeError if they do not come.
        """
        until, everybody = time.monotonic() + STARTING, len(self.jobs)
        while not self.is_done():
            for last in filter(None, map(self._last, self.jobs)):
                if (last["step"] or 0) >= step and last["messages"] == everybody:
                    return True
            if time.monotonic() > until:
                raise RuntimeError(f"not all workers met in {STARTING} s: see {self.directory}")
            time.sleep(0.1)
        return False

    def wait_until_all_end(self) -> None:
        """Wait for the workers to complete the run; one that has not come in time does not."""
        while not self.is_done():
            time.sleep(0.2)
        until = time.monotonic() + STARTING / 3
        while any(job.poll() is None for job in self.jobs.values()) and time.monotonic() < until:
            time.sleep(0.2)

    def news(self) -> str:
        """The newest that all have printed and logged."""
        printed = []
        for path in sorted([*self.directory.glob("*.txt"), *self.directory.glob(f"*/{LOG_NAME}")]):
            lines = path.read_text(errors="replace").replace("\r", "\n").splitlines()
            printed.append("\n".join([f"-- {path}", *(line[:300] for line in lines[-12:])]))
        return "\n".join(printed)

    def _log(self, worker: int) -> Path:
        return self.directory / f"worker{worker}" / LOG_NAME

    def _last(self, worker: int) -> dict | None:
        """Its newest round."""
        if not self._log(worker).exists():
            return None
        with self._log(worker).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            records = _records(file.read().decode().partition("\n")[2])
        meetings = [one for one in records if one["record"] == "membership"]
        return meetings[-1] if meetings else None


def _records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.split("\n")[:-1]]
