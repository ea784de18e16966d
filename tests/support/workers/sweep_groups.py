"""train.py with a count of process groups beside it; see test_groups.py.

    sweep_groups.py FILE ARGUMENT ...

Rank 0 writes how many there were when each job began, when it ended, and at the end of all.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from train import Run, run_job
from training.arguments import parse_arguments
from training.sweep import run_jobs
from training.workers import Workers

counts = []


def counted(job, directory: Path, workers: Workers) -> bool:
    counts.append(len(_world.pg_map))
    try:
        return run_job(job, directory, workers)
    finally:
        counts.append(len(_world.pg_map))


def build(config, workers: Workers) -> Run:
    """A run that is built once before all, with a group of its own."""
    dist.new_group()
    return Run(config, workers)


def work(workers: Workers) -> int:
    status = run_jobs(parse_arguments(sys.argv[2:]), workers, build, counted)
    counts.append(len(_world.pg_map))
    if workers.first:
        Path(sys.argv[1]).write_text(json.dumps([status, *counts]))
    return 0


if __name__ == "__main__":
    workers = Workers()
    sys.exit(workers.run(lambda: work(workers)))
