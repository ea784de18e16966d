"""A fleet on this machine, whose workers and lighthouse can be ended and started one by one."""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.faults import rounds_of
from scripts.fleet import GRACE, ROOT, worker_command
from scripts.netns import children, send
from scripts.studies import read_records
from scripts.supervise import free_port
from training.log import completed
from training.records import LOG_NAME
from training.workers import RunError

WORKER = Path(__file__).with_name("worker.py")
FLEET = ROOT / "scripts" / "fleet.py"
STARTING = 180  # seconds, at most, until a worker is there again


@dataclass
class Crew:
    """`workers` of a run in `directory`, whose steps take at least `pace` seconds.

    What they print goes to files in the directory. What is left of them ends with the context.
    """

    workers: int
    directory: Path
    overrides: list[str]
    pace: float

    def __post_init__(self):
        self.port = free_port()
        self.options = argparse.Namespace(
            workers=self.workers,
            ranks=1,
            timeout=None,
            shutdown_timeout=GRACE,
            lighthouse=f"http://localhost:{self.port}",
            overrides=[*self.overrides, f"directory={self.directory}"],
        )
        self.jobs: dict[int, subprocess.Popen] = {}

    def __enter__(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        self.start_lighthouse()
        for worker in range(self.workers):
            self.start(worker)
        return self

    def __exit__(self, kind, *_):
        if kind:
            print(self.news(), file=sys.stderr)
        for worker in self.jobs:
            self.end(worker, signal.SIGKILL)
        self.end_lighthouse()

    def start(self, worker: int) -> None:
        command = worker_command(self.options, worker, str(WORKER), str(self.pace))
        self.jobs[worker] = self._start(command, f"worker{worker}.txt")

    def start_lighthouse(self) -> None:
        options = [f"--workers={self.workers}", f"--port={self.port}"]
        command = [sys.executable, str(FLEET), "lighthouse", *options]
        self.lighthouse = self._start(command, "lighthouse.txt")

    def _start(self, command: list[str], output: str) -> subprocess.Popen:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with (self.directory / output).open("a") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, env=env, cwd=ROOT, start_new_session=True
            )

    def send(self, worker: int, number: signal.Signals) -> bool:
        """To the worker's processes, not to what starts them again; whether they were there."""
        return send(self.children(worker), number)

    def end(self, worker: int, number: signal.Signals) -> None:
        """The worker and what starts it again; returns when both are gone."""
        job, ranks = self.jobs[worker], self.children(worker)
        if number == signal.SIGKILL:
            job.kill()  # first, or it starts the worker again
        send(ranks, number)
        job.wait()

    def end_lighthouse(self) -> None:
        self.lighthouse.kill()
        self.lighthouse.wait()

    def children(self, worker: int) -> list[int]:
        """The processes of its ranks."""
        return children(self.jobs[worker].pid)

    def records(self, worker: int) -> list[dict]:
        """Of its log, whole ones."""
        return read_records(self.directory / f"worker{worker}" / LOG_NAME)

    def rounds(self, worker: int) -> list[dict]:
        return rounds_of(self.records(worker))

    def newest(self) -> list[dict]:
        """The newest round of every worker that has had one."""
        return [rounds[-1] for rounds in map(self.rounds, self.jobs) if rounds]

    def last_step(self) -> int:
        """Of the newest round of any worker."""
        return max((one["step"] for one in self.newest()), default=0)

    def is_done(self) -> bool:
        """Whether a worker has completed the run."""
        return any(completed(self.directory / f"worker{one}") for one in self.jobs)

    def wait_until_all_meet(self, step: int) -> bool:
        """Wait for a round, with that step or later, that has messages of all workers.

        Returns False if the run ends first. Raises RunError if they do not come.
        """
        until = time.monotonic() + STARTING
        while not self.is_done():
            rounds = [one for one in self.newest() if one["step"] >= step]
            if any(one["messages"] == len(self.jobs) for one in rounds):
                return True
            if time.monotonic() > until:
                raise RunError(f"not all workers met in {STARTING} s: see {self.directory}")
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
