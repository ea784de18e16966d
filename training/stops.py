"""Whether a run shall stop: asked of all workers seldom, but every few seconds of work."""

import math
import time

from training.workers import Workers

SECONDS = 5.0  # of steps between questions


class Stops:
    """Questions whether a stop was requested of any worker, at the same steps for all.

    They go over the same links as messages, and an answer is on its way while workers train on. So
    there are at most `most` steps between them, and as many as take SECONDS, at least one. How long
    steps take is asked with the same question: it is the mean of all workers.
    """

    def __init__(self, workers: Workers, most: int):
        self.requested = False
        self._workers, self._most = workers, most
        self._every, self._step, self._asked = 1, 0, 0  # by the count of steps, from here on
        self._next = min(2, most)  # a first step may only be measured
        self._answer = None
        self._since, self._seconds, self._steps = None, 0.0, 0  # of steps since the last question

    def start(self) -> None:
        """Let the time run from the next step on, as after an evaluation."""
        self._since = None

    def ask(self) -> None:
        """If it is time to; once in every step, before its round."""
        self._step += 1
        now = time.perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
            self._steps += 1
        self._since = now
        if self._step < self._next:
            return
        # Whole milliseconds, whose sum is the same on all workers whatever its order.
        told = round(1000 * self._seconds / self._steps) if self._steps else math.inf
        self._answer = self._workers.start_total(self._workers.asked_to_stop, told)
        self._asked, self._next = self._step, self._step + self._every
        self._seconds, self._steps = 0.0, 0

    def settle(self, at_once: bool) -> None:
        """Take the answer if it is due, or `at_once`; after a step, on all workers alike."""
        if self._answer is None or not (at_once or self._step >= self._asked + self._every // 2):
            return
        requests, milliseconds = self._answer()
        self._answer = None
        self.requested |= requests > 0
        mean = max(1.0, milliseconds / self._workers.count) / 1000
        self._every = max(1, min(self._most, int(SECONDS / mean)))
        self._next = self._asked + self._every
