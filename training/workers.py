"""The processes of a launch: who am I, and how do we agree."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist


class RunError(Exception):
    """A run cannot start or go on. One line: what was given, what is allowed, what to do."""


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def leave(status: int) -> NoReturn:
    """End the process, without the interpreter's teardown.

    Threads of gloo may still let go of tensors then, which needs the interpreter and aborts the
    process ("terminate called without an active exception") after all its work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Workers:
    """This process among the workers that torchrun started; alone without torchrun.

    `rank`, `count`, `device`: CUDA with NCCL where there is a GPU, else the CPU with gloo.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    def say(self, text: str = "", error: bool = False) -> None:
        """Print on rank 0."""
        if self.first:
            print(text, file=sys.stderr if error else sys.stdout, flush=True)

    def together(self, action: Callable):
        """Call `action` on every worker and return its result, or fail on all of them.

        An expected error (RunError, ValueError, OSError, ArithmeticError) of any worker becomes one
        RunError that all raise, so that no worker waits for one that has stopped.
        """
        result, problem = None, None
        try:
            result = action()
        except (RunError, ValueError, OSError, ArithmeticError) as error:
            problem = one_line(error)
        problems = [problem]
        if dist.is_initialized():
            problems = [None] * self.count
            dist.all_gather_object(problems, problem)
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if failed:
            prefix = "" if len(failed) == self.count else f"rank {failed[0]}: "
            raise RunError(prefix + problems[failed[0]])
        return result

    def broadcast(self, value):
        """Rank 0's value, on all workers."""
        if not dist.is_initialized():
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def total(self, *numbers: float | torch.Tensor) -> list[float]:
        """The sums of the numbers over all workers, in float64."""
        sums = torch.stack(
            [torch.as_tensor(n, dtype=torch.float64, device=self.device) for n in numbers]
        )
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums.tolist()

    def finish(self, work: Callable[[], int]) -> int:
        """Do the work of this process and leave the process group; returns the exit status.

        An expected error is one line and status 1: a RunError, which all workers raise, on rank 0;
        another of this worker alone on this worker, whose end torchrun takes for the end of all.
        """
        try:
            return work()
        except RunError as error:
            self.say(f"error: {error}", error=True)
        except (ValueError, OSError) as error:
            print(f"error: rank {self.rank}: {one_line(error)}", file=sys.stderr)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return 1
