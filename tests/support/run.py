"""Launches of real processes: workers under torchrun, train.py; and overrides for a short run."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
PATIENCE = 1200  # seconds to wait for what must come: it bounds a failure, and decides nothing else
SMALL = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "steps=4",
    "batch.sequences=4",
    "batch.per_forward=1",
    "eval.every=2",
    "eval.tokens=320",
    "log_every=1",
]


def torchrun(worker: str, *arguments, ranks: int) -> str:
    """Run tests/support/workers/`worker`; returns its output, AssertionError if it fails.

    The workers import what the repository has, and the modules of tests/support/.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", str(SUPPORT / "workers" / worker), *map(str, arguments)),
    ]
    paths = os.pathsep.join([str(ROOT), str(SUPPORT)])
    with subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            output, _ = process.communicate()
    assert process.returncode == 0, f"{worker} on {ranks} ranks failed:\n{output}"
    return output


def launch(workers: int, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    """Run train.py under torchrun, or without it when `workers` is 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
    result = subprocess.run(
        [sys.executable, *(torchrun if workers else []), "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def before_torchrun(stderr: str) -> str:
    """What our processes wrote, without torchrun's own report of their exit."""
    return stderr.split("torch/distributed/elastic/multiprocessing/api.py")[0]
