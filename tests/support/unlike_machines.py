"""Processes whose libraries compute as they would on other machines."""

import os
import subprocess
import sys

from run import PATIENCE, ROOT, SUPPORT

# A BLAS without fused products, and torch's own kernels without them.
OTHER = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}


def start_all(script: str, environments: list[dict[str, str]], *arguments) -> None:
    """Run tests/support/workers/`script NUMBER ARGUMENT ...` in each of the environments."""
    paths = os.pathsep.join([str(ROOT), str(SUPPORT)])
    processes = [
        subprocess.Popen(
            [sys.executable, SUPPORT / "workers" / script, str(number), *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment,
        )
        for number, environment in enumerate(environments)
    ]
    assert [process.wait(PATIENCE) for process in processes] == [0] * len(processes)
