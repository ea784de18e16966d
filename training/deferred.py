"""Results that are still on their way between workers while the training continues."""

from collections import deque
from collections.abc import Callable


class DeferredResults:
    """Results that are collected some steps after they were asked for, oldest first.

    All workers ask for and collect the same results at the same steps, so that none waits for a
    worker that is elsewhere.
    """

    def __init__(self, steps: int):
        self.steps = steps  # from the question to the answer
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def add(self, step: int, collect: Callable[[], None]) -> None:
        """Add a result that was asked for in a step; `collect` waits for it and uses it."""
        self._waiting.append((step + self.steps, collect))

    def collect(self, step: int, at_once: bool) -> None:
        """Collect the results that are due at a step, or all of them `at_once`."""
        while self._waiting and (at_once or self._waiting[0][0] <= step):
            _, collect = self._waiting.popleft()
            collect()
