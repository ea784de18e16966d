"""train.py on two nodes, in the background."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from scripts.netns import JobError, Network
from training.config import ROOT

LAUNCH_SECONDS = 300  # for a job that hangs in spite of train.py's timeout


class Job:
    """train.py on both nodes, in the background; what its workers write is added to `log`."""

    def __init__(self, network: Network, log: Path, arguments: list[str]):
        self.network = network
        environment = {"PET_MAX_RESTARTS": "2", "PET_NO_PYTHON": "1"}  # torchrun's options
        shell = ["bash", "-c", f'exec "$0" "$@" >>{log} 2>&1', sys.executable]
        command = [*shell, ROOT / "train.py", *arguments]

        def launch() -> None:
            with suppress(JobError):
                network.torchrun(*command, environment=environment, timeout=LAUNCH_SECONDS)

        self._thread = threading.Thread(target=launch)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None, until: Callable = lambda: False) -> bool:
        """Until the job has ended, the time is over or `until()`; returns whether it still runs."""
        end = math.inf if seconds is None else time.monotonic() + seconds
        while self.running and time.monotonic() < end and not until():
            self._thread.join(0.05)
        return self.running

    def worker(self, rank: int) -> int | None:
        """Its process id; None while there is none."""
        for pid in self._processes(rank):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"train.py" in command and b"bash" not in command:
                    return pid
        return None

    def send(self, rank: int, number: signal.Signals) -> bool:
        """A signal for a worker; whether it was there."""
        pid = self.worker(rank)
        with suppress(ProcessLookupError):
            os.kill(pid, number) if pid else None
            return pid is not None
        return False

    def kill(self) -> None:
        """End the job as a loss of power does."""
        while self.running:
            for pid in [*self._processes(0), *self._processes(1)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._thread.join(0.05)

    def _processes(self, rank: int) -> list[int]:
        command = ["ip", "netns", "pids", self.network.names[rank]]
        return [int(pid) for pid in subprocess.check_output(command, text=True).split()]
