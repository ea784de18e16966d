"""Where the time of a step goes, without making the device wait."""

import time
from collections import defaultdict, deque
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Seconds spent in named phases: `with timer("encode"): ...`.

    On CUDA a phase is timed by events on the current stream, which are read only by `read()`; of
    the phases that nobody reads the last 10,000 are kept.
    """

    def __init__(self):
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=10_000)

    @contextmanager
    def __call__(self, phase: str):
        if torch.cuda.is_available():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._events.append((phase, start, stop))
        else:
            start = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call. Waits for the device."""
        for phase, start, stop in self._events:
            stop.synchronize()
            self._seconds[phase] += start.elapsed_time(stop) / 1000
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds
