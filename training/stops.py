"""Requests to stop, which may reach any worker, and which all workers learn at the same step."""

import math
import time

from training.workers import Workers

SECONDS = 5.0  # of training between questions


class StopRequests:
    """Asks all workers, now and then, whether any of them was asked to stop.

    `requested` is True once one was. The questions use the same links as the messages, and workers
    train on while an answer is on its way. Between questions there are as many steps as take
    SECONDS: at least one, and at most `most`. How long a step takes is part of the question: it is
    the mean over all workers, so that all of them ask at the same steps.
    """

    def __init__(self, workers: Workers, most: int):
        self.requested = False
        self._workers, self._most = workers, most
        # The interval of questions, this step, and the step of the last question.
        self._every, self._step, self._asked = 1, 0, 0
        self._next = min(2, most)  # the first step is only timed
        self._answer = None
        # When the current step began; seconds and number of the steps since the last question.
        self._since, self._seconds, self._steps = None, 0.0, 0

    def restart_clock(self) -> None:
        """Time the steps from the next one on, as after an evaluation."""
        self._since = None

    def ask(self) -> None:
        """Ask if it is time to. To be called once in every step, before the workers communicate."""
        self._step += 1
        now = time.perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
            self._steps += 1
        self._since = now
        if self._step < self._next:
            return
        # Whole milliseconds, whose sum is the same on all workers in whatever order it is taken.
        milliseconds = round(1000 * self._seconds / self._steps) if self._steps else math.inf
        self._answer = self._workers.start_sum(self._workers.asked_to_stop, milliseconds)
        self._asked, self._next = self._step, self._step + self._every
        self._seconds, self._steps = 0.0, 0

    def collect(self, at_once: bool) -> None:
        """Wait for the answer if it is due, or `at_once`. To be called after every step.

        The answer is due half an interval after the question, on all workers alike.
        """
        if self._answer is None or not (at_once or self._step >= self._asked + self._every // 2):
            return
        requests, milliseconds = self._answer()
        self._answer = None
        self.requested |= requests > 0
        mean = max(1.0, milliseconds / self._workers.count) / 1000
        self._every = max(1, min(self._most, int(SECONDS / mean)))
        self._next = self._asked + self._every
