"""Launches of real torchrun processes."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def torchrun(worker: str, *arguments, ranks: int, timeout: float = 120) -> str:
    """Run tests/workers/`worker` on `ranks` ranks; returns its output, AssertionError if it fails.

    The workers import ef21_muon and the modules of tests/.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", str(TESTS / "workers" / worker), *map(str, arguments)),
    ]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    with subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            output, _ = process.communicate()
    assert process.returncode == 0, f"{worker} on {ranks} ranks failed:\n{output}"
    return output
