"""Waiting for other threads and processes, so that no verdict depends on their speed."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from run import PATIENCE


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def runs(pid: int | str) -> bool:
    """Whether a process is there, other than as a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


class SleptTime:
    """Stands in for the module `time`: only sleep takes time, that of the thread that sleeps.

    Of several `threads` none wakes before all of them have slept equally often, so what one has
    done before it sleeps, all know after it.
    """

    def __init__(self, threads: int = 1):
        self._slept = threading.local()
        self._together = threading.Barrier(threads, timeout=PATIENCE)

    def monotonic(self) -> float:
        return getattr(self._slept, "seconds", 0.0)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self._together.wait()
        self._slept.seconds = self.monotonic() + seconds
