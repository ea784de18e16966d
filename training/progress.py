"""How far a run is: bytes, times and phases in all, and the losses that its next record is of."""

import time
from collections.abc import Callable

import torch

from training.workers import Workers

OPTIMIZER_PHASES = ("encode", "exchange", "server", "decode")
# Cumulative byte counts go on from those of a checkpoint, whoever counts.
BYTES = ("w2s_bytes", "s2w_bytes", "received_bytes", "wire_tx_bytes")


class Progress:
    """Of this worker: `seconds` of training and of its `phases`; `loss_sum` since the last record.

    The time runs from `start` on, and counts with every call of `clock`. synced_steps: of a run
    after so many steps those that W has of all workers.
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
        self.bytes_before = dict.fromkeys(BYTES, 0)  # of what the optimizer does not count itself
        self.seconds = 0.0
        self.phases = dict.fromkeys(("data", "forward_backward", *OPTIMIZER_PHASES), 0.0)
        self.loss_sum, self.steps = torch.zeros((), device=workers.device), 0
        self._problem: FloatingPointError | None = None

    def start(self) -> None:
        """Let the time run, as after an evaluation."""
        self._since = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Count a step."""
        self.loss_sum += loss
        self.steps += 1

    def clock(self) -> None:
        """Count the time, once all that was asked of the device is done."""
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
        """Raise RunError, on all workers, if a gradient of any was not finite at the last clock."""
        self.workers.together(lambda: fail(self._problem))

    def tell(self, record: dict, write: Callable[[dict], None]) -> Callable[[], None]:
        """Start to sum up the mean losses of all workers' last steps, with which a record is made.

        Returns a function that waits for the sum and writes the record; it raises RunError if a
        gradient of any worker was not finite.
        """
        problem, mean = self._problem, self.loss_sum / self.steps
        told = self.workers.start_total(mean / self.workers.count, problem is not None)
        self.loss_sum.zero_()
        self.steps = 0

        def read() -> None:
            loss, broken = told()
            if broken:
                self.workers.together(lambda: fail(problem))
            write(record | {"loss": loss})

        return read

    def position(self, step: int) -> dict:
        """Where the run is after so many steps, for a record. Bytes are per worker.

        To be called on all ranks of a worker.
        """
        return {
            "step": step,
            "round": self.optimizer.round,
            "tokens": self.synced_steps(step) * self.tokens_per_step,
            **{key: self.bytes_before[key] + own for key, own in self.counted().items()},
            "seconds": round(self.seconds, 3),
        }

    def counted(self) -> dict[str, int]:
        """What the optimizer counts: bytes of this worker, and what this rank sends to others.

        To be called on all ranks of a worker.
        """
        optimizer = self.optimizer
        own = optimizer.w2s_bytes, optimizer.s2w_bytes, optimizer.received_bytes
        own = optimizer.mesh.total(*own) if optimizer.mesh else own
        return dict(zip(BYTES, (*own, optimizer.wire_tx_bytes), strict=True))

    def count_on_from(self, position: dict) -> None:
        """Let bytes be those of a record of where the run was, from here on."""
        self.bytes_before = {key: position[key] - own for key, own in self.counted().items()}

    @property
    def rounded_phases(self) -> dict[str, float]:
        """To milliseconds, for a record."""
        return {phase: round(seconds, 3) for phase, seconds in self.phases.items()}

    @property
    def optimizer_share(self) -> float:
        """The share of the optimizer's phases in all."""
        in_all = sum(self.phases.values()) or 1.0  # of a worker that came after the last step
        return sum(self.phases[phase] for phase in OPTIMIZER_PHASES) / in_all

    def state(self) -> dict:
        """Of all workers, for a checkpoint's facts."""
        since_record = self.workers.gather([self.loss_sum.item(), self.steps])
        return {"phases": self.phases, "since_record": since_record}

    def go_on(self, facts: dict) -> None:
        """From a checkpoint's facts, of any number of workers."""
        self.seconds, self.phases = facts["position"]["seconds"], facts["phases"]
        losses, steps = zip(*facts.get("since_record", [[0.0, 0]]), strict=True)
        own = len(losses) == self.workers.count
        self.loss_sum.fill_(losses[self.workers.rank] if own else sum(losses) / len(losses))
        self.steps = steps[0]


def fail(error: Exception | None) -> None:
    """Raise the error, if there is one."""
    if error is not None:
        raise error
