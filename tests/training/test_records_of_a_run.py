"""When a run writes what: one worker in this process."""

import json

import pytest
from run import PATIENCE
from workers.resume import around_steps, run_alone

from train import run_job
from training.config import compose
from training.workers import Workers

SELDOM = ("steps=11", "checkpoint.every=0", "log_every=4", "eval.every=3")


def steps_of(directory) -> list[tuple[str, int]]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(one["record"], one["step"]) for one in lines if one["record"] in ("train", "eval")]


@pytest.mark.parametrize("every", [1, 11])
def test_records_come_in_the_order_of_steps(small, tmp_path, every):
    """Also where workers train on before a record's sum has come; and each test has its loss."""
    run_alone(tmp_path, *small, "optimizer=local", f"optimizer.sync_every={every}", *SELDOM)
    expected = []
    for step in (3, 4, 6, 8, 9, 11):
        expected += [("train", step)] + [("eval", step)] * (step in (3, 6, 9, 11))
    assert steps_of(tmp_path) == expected


def test_a_run_that_keeps_no_checkpoint_says_so_when_it_is_stopped(small, tmp_path, capsys):
    job = compose((*small, "steps=4", "checkpoint.every=0"))
    with around_steps(before=lambda run, step: setattr(run.stop_requests, "requested", step == 2)):
        assert not run_job(job, tmp_path, Workers(PATIENCE))
    assert (
        "stopped as asked: without a checkpoint, since checkpoint.every=0"
        in capsys.readouterr().out
    )
