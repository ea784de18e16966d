"""What several benchmarks measure with: the ranks of a launch, and the name of the processor."""

import argparse
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from training.workers import Workers, exit_process


def processor() -> str:
    """The name of this machine's processor, or its architecture where the kernel gives no name."""
    name = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return name[1] if name else platform.machine()


def by_ranks(measure: Callable[[argparse.Namespace, Workers], Iterable[dict]]) -> Callable:
    """A `measure` for `studies.command` that all ranks run; the first one returns the records.

    For the others, and after an error, the process ends here.
    """

    def measured(options: argparse.Namespace) -> list[dict]:
        workers, records = Workers(), []
        status = workers.run(lambda: records.extend(measure(options, workers)) or 0)
        if status or not workers.first:
            exit_process(status)
        return records

    return measured
