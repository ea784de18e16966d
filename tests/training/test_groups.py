"""Process groups of jobs, which end with them."""

import json

from run import torchrun


def test_the_groups_of_a_job_end_with_it(small, tmp_path):
    """Of a sweep on two workers whose checkpoints have a group; the second job fails."""
    counts = tmp_path / "counts.json"
    sweep = ("-m", f"runs={tmp_path}/runs", "optimizer.lr=0.01,1e38,0.03", "fail_fast=false")
    own = ("checkpoint.asynchronous=true", "checkpoint.every=2", "log_every=4")
    torchrun("sweep_groups.py", counts, *sweep, *small, *own, ranks=2)
    status, *of_jobs, at_the_end = json.loads(counts.read_text())
    before = 2  # of all, and of what workers agree on
    assert status == 1 and at_the_end == before
    assert of_jobs == [before, before + 1] * 3
