"""Processes whose libraries compute as they would on other machines."""

import os
import sys

import pytest
import torch
from bad_inputs import free_port
from preloaded import start
from run import PATHS, PATIENCE, ROOT, SUPPORT

NEEDS_MKL = pytest.mark.skipif(
    not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="MKL and AVX2, which can be made to compute as on another machine",
)
# A BLAS without fused products, and torch's own kernels without them.
OTHER = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}


def start_all(script: str, environments: list[dict[str, str]], *arguments) -> None:
    """Run tests/support/workers/`script NUMBER ARGUMENT ...` in each of the environments."""
    command = SUPPORT / "workers" / script
    _start([[command, number, *arguments] for number, _ in enumerate(environments)], environments)


def train_on_all(environments: list[dict[str, str]], *overrides: str) -> None:
    """Run train.py with a rank in each of the environments."""
    count, port = str(len(environments)), str(free_port())
    place = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [
        place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment
        for rank, environment in enumerate(environments)
    ]
    _start([[ROOT / "train.py", *overrides]] * len(ranks), ranks)


def _start(commands: list[list], environments: list[dict[str, str]]) -> None:
    """Libraries read how they are to compute as they start, so only a process like others forks."""
    options = {"cwd": os.getcwd(), "stdout": sys.__stdout__, "stderr": sys.__stderr__}
    processes = [
        start(
            [*map(str, command)],
            fresh=not OTHER.keys().isdisjoint(environment),
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS} | environment,
            **options,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    assert [process.wait(PATIENCE) for process in processes] == [0] * len(processes)
