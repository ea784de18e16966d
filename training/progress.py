"""How far a run is: its bytes and times so far, and the losses since its last train record."""

import time
from collections.abc import Callable

import torch

from training.workers import Workers

OPTIMIZER_PHASES = ("encode", "exchange", "server", "decode")
# Cumulative byte counts. After a resume they continue from those of the checkpoint.
BYTES = ("w2s_bytes", "s2w_bytes", "received_bytes", "wire_tx_bytes")


class Progress:
    """Counts the bytes, seconds and losses of this worker.

    `seconds` is the training time, `phases` the seconds of its phases, and `loss_sum` the sum of
    the losses since the last train record. The clock runs from `start_clock` on, and
    `update_times` adds what has passed since.

    Args:
        workers: all workers.
        optimizer: the optimizer, which counts bytes and times its phases.
        tokens_per_step: the tokens that one worker reads in a step.
        synced_steps: a function from the number of steps of this worker to the number of local
            steps of all workers that are part of W.
    """

    def __init__(
        self,
        workers: Workers,
        optimizer: torch.optim.Optimizer,
        tokens_per_step: int,
        synced_steps: Callable[[int], int],
    ):
        self.workers, self.optimizer = workers, optimizer
        self.tokens_per_step, self.synced_steps = tokens_per_step, synced_steps
        self.bytes_before = dict.fromkeys(BYTES, 0)  # that this optimizer has not counted itself
        self.seconds = 0.0
        self.phases = dict.fromkeys(("data", "forward_backward", *OPTIMIZER_PHASES), 0.0)
        self.loss_sum, self.steps = torch.zeros((), device=workers.device), 0
        self._problem: FloatingPointError | None = None

    def start_clock(self) -> None:
        """Start the clock, or restart it after what is not training, such as an evaluation."""
        self._since = time.perf_counter()

    def count_step(self, loss: torch.Tensor) -> None:
        """Count a step and its loss."""
        self.loss_sum += loss
        self.steps += 1

    def update_times(self) -> None:
        """Add the time since the last call, once the device has done all its work."""
        self._problem = None
        try:
            self.optimizer.check_finite()
        except FloatingPointError as error:
            self._problem = error
        for phase, seconds in self.optimizer.timer.read().items():
            self.phases[phase] += seconds
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def require_finite(self) -> None:
        """Raise RunError, on all workers, if any gradient was not finite in `update_times`."""
        self.workers.together(lambda: fail(self._problem))

    def start_record(self, record: dict, write: Callable[[dict], None]) -> Callable[[], None]:
        """Start the mean, over all workers, of the losses since the last record.

        Args:
            record: the record without its loss.
            write: is called with the whole record.

        Returns:
            A function that waits for the mean and writes the record. It raises RunError if a
            gradient of any worker was not finite.
        """
        problem, mean = self._problem, self.loss_sum / self.steps
        wait = self.workers.start_sum(mean / self.workers.count, problem is not None)
        self.loss_sum.zero_()
        self.steps = 0

        def finish() -> None:
            loss, problems = wait()
            if problems:
                self.workers.together(lambda: fail(problem))
            write(record | {"loss": loss})

        return finish

    def position(self, step: int) -> dict:
        """Where the run is after so many steps, for a record. Bytes are per worker.

        All ranks of a worker have to call this.
        """
        return {
            "step": step,
            "round": self.optimizer.round,
            "tokens": self.synced_steps(step) * self.tokens_per_step,
            **{key: self.bytes_before[key] + own for key, own in self.byte_counts().items()},
            "seconds": round(self.seconds, 3),
        }

    def byte_counts(self) -> dict[str, int]:
        """The bytes that the optimizer has counted: this worker's, and what this rank sends.

        All ranks of a worker have to call this.
        """
        optimizer = self.optimizer
        own = optimizer.w2s_bytes, optimizer.s2w_bytes, optimizer.received_bytes
        own = optimizer.mesh.total(*own) if optimizer.mesh else own
        return dict(zip(BYTES, (*own, optimizer.wire_tx_bytes), strict=True))

    def resume_byte_counts(self, position: dict) -> None:
        """Continue the byte counts from those of a record."""
        self.bytes_before = {key: position[key] - own for key, own in self.byte_counts().items()}

    @property
    def rounded_phases(self) -> dict[str, float]:
        """The seconds of the phases, rounded to milliseconds for a record."""
        return {phase: round(seconds, 3) for phase, seconds in self.phases.items()}

    @property
    def optimizer_share(self) -> float:
        """The share of the optimizer's phases in the time of all phases."""
        in_all = sum(self.phases.values()) or 1.0  # a worker may join after the last step
        return sum(self.phases[phase] for phase in OPTIMIZER_PHASES) / in_all

    def state(self) -> dict:
        """The times and losses of all workers, for a checkpoint."""
        since_record = self.workers.gather([self.loss_sum.item(), self.steps])
        return {"phases": self.phases, "since_record": since_record}

    def resume(self, facts: dict) -> None:
        """Continue from a checkpoint's facts, whatever the number of its workers was."""
        self.seconds, self.phases = facts["position"]["seconds"], facts["phases"]
        losses, steps = zip(*facts.get("since_record", [[0.0, 0]]), strict=True)
        own = len(losses) == self.workers.count
        self.loss_sum.fill_(losses[self.workers.rank] if own else sum(losses) / len(losses))
        self.steps = steps[0]


def fail(error: Exception | None) -> None:
    """Raise the error, if there is one."""
    if error is not None:
        raise error
