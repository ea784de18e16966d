"""What several workers print, on one console."""

import re
import subprocess
import sys
from contextlib import suppress
from threading import Lock, Thread
from typing import IO


class Console:
    """Shows every line behind the number of its worker.

    Tables, progress and results are printed by all workers, and shown of one: the first that has
    not failed. Errors are shown of all; one that several workers have is shown once.
    """

    PROGRESS = re.compile(r"step +\d+ of \d+  ")  # as training/console.py has it in a file

    def __init__(self, workers: int):
        self._speakers, self._held = {0}, [[] for _ in range(workers)]  # lines to show later
        self._errors: dict[str, int] = {}  # which worker had it first
        self._lock, self._threads = Lock(), []

    def follow(self, worker: int, process: subprocess.Popen) -> None:
        """Read what a process of this worker prints until it ends; stdout and stderr are pipes."""
        streams = {process.stdout: self._take_output, process.stderr: self._take_error}
        for stream, take in streams.items():
            thread = Thread(target=self._read, args=(worker, stream, take), daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Wait for the last lines of processes that have ended."""
        for thread in self._threads:
            thread.join()

    def let_speak(self, worker: int) -> None:
        """Show this worker's tables, progress and results from now on, and those so far."""
        with self._lock:
            self._speakers.add(worker)
            for line in self._held[worker]:
                self._show(worker, line, sys.stdout)
            self._held[worker].clear()

    def _read(self, worker: int, stream: IO[bytes], take) -> None:
        for line in stream:
            text = line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
            with self._lock:
                take(worker, text)

    def _take_output(self, worker: int, text: str) -> None:
        if worker in self._speakers:
            self._show(worker, text, sys.stdout)
        else:
            self._held[worker].append(text)

    def _take_error(self, worker: int, text: str) -> None:
        if self.PROGRESS.match(text) and worker not in self._speakers:
            return
        first = self._errors.setdefault(text, worker) if text.startswith("error: ") else worker
        if first == worker:
            self._show(worker, text, sys.stderr)

    @staticmethod
    def _show(worker: int, text: str, stream: IO[str]) -> None:
        with suppress(OSError):  # of a terminal that is gone, for which no worker waits
            print(f"worker {worker}: {text}" if text else "", file=stream, flush=True)
