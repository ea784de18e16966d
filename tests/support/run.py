"""Launches of real processes: workers under torchrun, train.py; and overrides for a short run."""

import os
import subprocess
import tempfile
from pathlib import Path

from preloaded import TORCHRUN, start

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
PATHS = os.pathsep.join([str(ROOT), str(SUPPORT)])  # what workers import from
PATIENCE = 1200  # seconds to wait for what must come: it bounds a failure, and decides nothing else
SMALL = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "steps=4",
    "batch.global_size=4",
    "batch.micro_size=1",
    "eval.every=2",
    "eval.tokens=320",
    "log_every=1",
]


def torchrun(worker: str, *arguments, ranks: int) -> str:
    """Run tests/support/workers/`worker`; returns its output, AssertionError if it fails.

    The workers import what the repository has, and the modules of tests/support/.
    """
    command = [
        *(*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}"),
        *(str(SUPPORT / "workers" / worker), *map(str, arguments)),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    with tempfile.TemporaryFile("w+") as output:
        process = start(command, cwd=Path.cwd(), env=env, stdout=output, stderr=output)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            process.wait()
        output.seek(0)
        text = output.read()
    assert process.returncode == 0, f"{worker} on {ranks} ranks failed:\n{text}"
    return text


def launch(
    workers: int, *arguments: str, expect: int = 0, fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run train.py under torchrun, or without it when `workers` is 0; `fresh`: see preloaded.py."""
    torchrun = [*TORCHRUN, "--standalone", f"--nproc_per_node={workers}"] if workers else []
    return script(*torchrun, "train.py", *arguments, expect=expect, fresh=fresh)


def script(*command: object, expect: int = 0, fresh: bool = False) -> subprocess.CompletedProcess:
    """Run a script of the repository with arguments, in its root, to its end."""
    command = [*map(str, command)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(command, fresh, cwd=ROOT, env=env, stdout=stdout, stderr=stderr)
        try:
            process.wait(PATIENCE)
        except BaseException:
            process.kill()
            raise
        stdout.seek(0)
        stderr.seek(0)
        result = subprocess.CompletedProcess(
            command, process.returncode, stdout.read(), stderr.read()
        )
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def before_torchrun(stderr: str) -> str:
    """What our processes wrote, without torchrun's own report of their exit."""
    return stderr.split("torch/distributed/elastic/multiprocessing/api.py")[0]
