"""What several benchmarks measure and report with."""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from train import Run

WARM_UP = 4  # steps before DDP is timed: the PowerSGD hook starts to compress in the third


def processor() -> str:
    """The name of this machine's processor, or its architecture where the kernel gives no name."""
    name = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return name[1] if name else platform.machine()


def time_steps(run: Run, steps: int, after_each: Callable = lambda: None) -> tuple[float, float]:
    """Seconds and bytes handed to the network, a step."""
    dist.barrier()
    start, sent = time.perf_counter(), run.optimizer.wire_tx_bytes
    for _ in range(steps):
        run.step()
        after_each()
    seconds = time.perf_counter() - start
    return seconds / steps, (run.optimizer.wire_tx_bytes - sent) / steps


def markdown(rows: list[list[str]], text_columns: int) -> str:
    """A table of rows of text; the first is the heading."""
    heading, *body = rows
    rule = ["---"] * text_columns + ["---:"] * (len(heading) - text_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *body))
