"""Process groups of jobs, which end with them."""

import json

from run import torchrun


def test_the_groups_of_a_job_end_with_it(small, tmp_path):
    """Of a sweep on two workers whose checkpoints have a group; the second job fails.

    Those of the last one end with the process.
    """
    counts = tmp_path / "counts.json"
    sweep = ("-m", f"runs={tmp_path}/runs", "optimizer.lr=0.01,1e38,0.03", "fail_fast=false")
    own = ("checkpoint.asynchronous=true", "checkpoint.every=2", "log_every=4")
    torchrun("sweep_groups.py", counts, *sweep, *small, *own, ranks=2)
    status, *of_jobs, at_the_end = json.loads(counts.read_text())
    before = 2  # of all, and of what workers agree on
    assert status == 1 and at_the_end == before + 1
    assert of_jobs == [before, before + 1] * 3


def test_jobs_of_workers_of_several_ranks_share_a_mesh(small, tmp_path):
    """Of a worker of two ranks, with a sharded model."""
    counts = tmp_path / "counts.json"
    sweep = ("-m", f"runs={tmp_path}/runs", "seed=0,1", "ranks_per_worker=2", "fsdp=true")
    torchrun("sweep_groups.py", counts, *sweep, *small, "steps=2", ranks=2)
    status, *of_jobs, at_the_end = json.loads(counts.read_text())
    of_mesh = 2  # that of the worker, and of the ranks with the same layers
    assert status == 0 and {*of_jobs, at_the_end} == {2 + of_mesh} and len(of_jobs) == 4
