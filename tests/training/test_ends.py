"""Who may write a run's directory, and how runs end: stopped, diverged, or refused before."""

import json
import os
import re
import shlex
import signal

import pytest
from run import launch
from workers.resume import around_steps, run_alone

from data.files import Claim
from training.arguments import parse_arguments, pasted
from training.config import compose
from training.records import read_log
from training.sweep import run_jobs
from training.workers import FINAL, RunError, Workers


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_goes_on_is_not_started_twice(small, tmp_path):
    place = f"directory={tmp_path}/run"
    with Claim(tmp_path / "run"):
        for again in (("resume=auto", place), ("resume=elastic", place)):
            result = launch(0, *small, *again, expect=FINAL)
            told = f"error: {tmp_path}/run is being written by process {os.getpid()} on "
            assert result.stderr.count(told) == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_two_single_runs_at_once_have_a_directory_each(small, tmp_path):
    from training.sweep import claim_directory

    job = compose((*small, f"runs={tmp_path}"))
    with claim_directory(job, 1, multirun=False) as one:
        with claim_directory(job, 1, multirun=False) as other:
            assert other.folder.name == f"{one.folder.name}-2"
        (one.folder / "metrics.jsonl").touch()
    with claim_directory(job, 1, multirun=False) as later:
        assert later.folder.name == other.folder.name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_leaves_no_trace_in_the_log(small, tmp_path, request, number):
    """Also between two records, whose losses then are those of all steps since the first."""
    overrides = (*small, "log_every=3", "eval.every=100", "steps=6", "checkpoint.every=100")

    def run(directory, *more):
        run_alone(directory, *overrides, *more)
        lines = records(directory)
        return [(r["step"], r["loss"]) for r in lines if r["record"] == "train"]

    whole = run(tmp_path / "whole")
    assert [step for step, _ in whole] == [3, 6]

    def ask(run, step):
        if step == 4:
            os.kill(os.getpid(), number)

    # A background job ignores SIGINT, and may be asked to stop by it all the same.
    before = signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(number, before))
    stopped = tmp_path / "stopped"
    with around_steps(before=ask), pytest.raises(AssertionError):  # it has not come to its end
        run(stopped)
    assert records(stopped)[-1] == {"record": "end", "status": "stopped", "step": 4}
    assert run(stopped, "resume=auto") == whole


def test_under_nohup_sighup_does_nothing(small, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with around_steps(before=lambda run, step: os.kill(os.getpid(), signal.SIGHUP)):
            run_alone(tmp_path, *small)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert records(tmp_path)[-1]["status"] == "completed"


def test_the_run_record_is_on_the_disk_before_the_first_step(small, tmp_path):
    def look(run, step):
        assert records(tmp_path)[0]["record"] == "run"

    with around_steps(before=look):
        run_alone(tmp_path, *small)


def test_a_run_that_diverges_in_its_last_step_has_failed(small, tmp_path):
    message = r"the test loss is (nan|inf) after step 1: lower the learning rate"
    with pytest.raises(RunError, match=message):
        run_alone(tmp_path, *small, "steps=1", "optimizer.lr=1e38")
    end = records(tmp_path)[-1]
    assert end["status"] == "failed" and end["error"].startswith("the test loss is ")


def test_a_bad_job_of_a_sweep_is_told_before_the_first_trains(small, tmp_path):
    jobs = ("-m", *small, f"runs={tmp_path}/runs", "optimizer.weight_decay=0,-1")
    result = launch(0, *jobs, expect=FINAL)
    assert result.stderr.startswith("error: weight_decay=-1 is not allowed: give a number of")
    assert "(in optimizer.weight_decay=-1 " in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name", ["plain", "w2s=topk,seed=1-1f2e3d4c", "with space", "it's", "a$b", 'say "so"', "a\\b"]
)
def test_the_command_that_a_stopped_run_prints_can_be_pasted(tmp_path, name):
    (argument,) = shlex.split(pasted("directory", tmp_path / name))
    assert compose((argument,)).config.directory == str(tmp_path / name)


class FirstOfTwo(Workers):
    """Rank 0, beside a rank 1 that was given `other`."""

    def __init__(self, other):
        super().__init__()
        self.other, self.asked = other, 0

    def gather(self, value):
        self.asked += 1
        return [value, self.other if self.asked == 1 else value]


@pytest.mark.parametrize(
    ("overrides", "other", "told"),
    [
        (["optimizer.lr=0.02"], ["optimizer.lr=0.2"], "optimizer.lr=0.2 where rank 0 has optimize"),
        (["steps=4"], ["seed=1", "steps=4"], "seed=1 where rank 0 has without"),
        (["w2s.fraction=0.1"], [], "without where rank 0 has w2s.fraction=0.1: start all workers"),
        ([], ["-m", "seed=1,2"], "-m seed=1,2 where rank 0 has without"),
    ],
)
def test_workers_that_were_told_different_things_do_not_start(overrides, other, told):
    arguments = parse_arguments(overrides)
    with pytest.raises(RunError, match=f"rank 1 was started with {re.escape(told)}"):
        run_jobs(arguments, FirstOfTwo(other), None, None)


def test_the_order_of_overrides_may_differ(capsys):
    arguments = parse_arguments(["seed=1", "steps=4", "--cfg"])
    assert run_jobs(arguments, FirstOfTwo(["--cfg", "seed=1", "steps=4"]), None, None) == 0
    assert "steps: 4" in capsys.readouterr().out


def test_configurations_that_differ_between_nodes_are_told(monkeypatch):
    class OtherFiles(FirstOfTwo):
        def gather(self, value):
            (first, second) = super().gather(value)
            if self.asked != 5:
                return [first, second]
            other = second[0] | {"seed": 7, "eval": second[0]["eval"] | {"every": 3}}
            return [first, [other]]

    told = re.escape(
        "rank 1 and rank 0 make different configurations of the same command line (eval.every=3 "
        "against 50, seed=7 against 0): use the same code and configs/ on all nodes"
    )
    with pytest.raises(RunError, match=told):
        run_jobs(parse_arguments([]), OtherFiles([]), None, None)


def test_a_shuffled_sweep_is_rank_0s_on_all(monkeypatch):
    class SecondOfTwo(Workers):
        """Whose rank 0 has drawn this order."""

        def broadcast(self, value):
            return order if isinstance(value, list) else value

    order = [(f"optimizer.lr={lr}",) for lr in (0.3, 0.1, 0.2)]
    seen = []
    monkeypatch.setattr("training.sweep._train", lambda job, *_: seen.append(job) or True)
    arguments = parse_arguments(["-m", "optimizer.lr=shuffle(0.1,0.2,0.3)"])
    assert run_jobs(arguments, SecondOfTwo(), lambda config, workers: None, None) == 0
    assert [job.config.optimizer.lr for job in seen] == [0.3, 0.1, 0.2]


def test_tokens_a_second_are_those_since_the_last_record(small, tmp_path, capsys):
    run_alone(tmp_path, *small)
    lines = capsys.readouterr().err.splitlines()
    trains = read_log(tmp_path / "metrics.jsonl").train
    before = {"tokens": 0, "seconds": 0}
    for text, now in zip(lines, trains, strict=True):
        tokens, seconds = (now[key] - before[key] for key in before)
        assert text.startswith(f"step {now['step']:>6} of 4  loss {now['loss']:.3f}, ")
        assert f" {tokens / seconds / 1000:.1f}k tokens/s, " in text
        before = {key: now[key] for key in before}
