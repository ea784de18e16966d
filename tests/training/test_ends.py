"""Who may write a run's directory, and how runs end: stopped, diverged, or refused before."""

import gc
import json
import os
import re
import shlex
import signal
import warnings

import pytest
from run import launch
from workers.resume import around_steps, run_alone

import train
from data.files import Claim
from training.arguments import parse_arguments, pasted
from training.config import compose
from training.records import read_log
from training.resume import cut_off
from training.sweep import run_jobs
from training.workers import FINAL, FinalError, RunError, Workers


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


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGHUP]
)
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


def test_local_steps_that_a_checkpoint_holds_are_not_warned_of(small, tmp_path):
    """A run that stops in the middle of a round sends its local steps after it resumes."""
    overrides = (*small, "optimizer=local", "optimizer.sync_every=4", "steps=4")

    def ask(run, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with around_steps(before=ask), pytest.raises(AssertionError):
            run_alone(tmp_path, *overrides)
        gc.collect()
        run_alone(tmp_path, *overrides, "resume=auto")
        gc.collect()
    assert not [one for one in warned if "never sent" in str(one.message)]
    assert records(tmp_path)[-1]["status"] == "completed"


def test_under_nohup_sighup_does_nothing(small, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with around_steps(before=lambda run, step: os.kill(os.getpid(), signal.SIGHUP)):
            run_alone(tmp_path, *small, "steps=2", "checkpoint.every=0")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert records(tmp_path)[-1]["status"] == "completed"


def test_the_run_record_is_on_the_disk_before_the_first_step(small, tmp_path):
    def look(run, step):
        assert records(tmp_path)[0]["record"] == "run"

    with around_steps(before=look):
        run_alone(tmp_path, *small, "steps=1", "checkpoint.every=0")


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


END = '{"record": "end", "status": "stopped"}\n'


@pytest.mark.parametrize(
    ("log", "folders", "cut"),
    [
        (None, [], None),
        ("", [], None),
        ('{"record": "run"}\n', [], "the last start was cut off"),
        ('{"record": "run"}\n{"record": "tr', ["step-00000002"], "the last start was cut off"),
        ('{"record": "run"}\n{"record": "en', [], "the last start was cut off"),
        (
            '{"record": "train"}\n',
            ["step-00000002", "step-00000004.partial"],
            "the last start was cut off while it wrote step-00000004",
        ),
        (END, ["step-00000002"], None),
        (
            '{"record": "end", "status": "failed"}\n',  # of rank 0, which was not killed
            ["step-00000002", "step-00000004.partial"],
            "the last start was cut off while it wrote step-00000004",
        ),
    ],
)
def test_the_next_start_says_what_was_cut_off(tmp_path, log, folders, cut):
    for name in (*folders, "step-of-mine.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    if log is not None:
        (tmp_path / "metrics.jsonl").write_text(log)
    assert cut_off(tmp_path, tmp_path / "checkpoints") == cut
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    gone = {"step-00000004.partial"} if cut else set()
    assert left == {*folders, "step-of-mine.partial"} - gone
    again = cut_off(tmp_path, tmp_path / "checkpoints")  # the next start was cut off elsewhere
    assert again in (None, "the last start was cut off")


def test_a_run_that_was_cut_off_in_a_checkpoint_says_so_when_it_is_resumed(small, tmp_path, capsys):
    with pytest.raises(RuntimeError), around_steps(before=lambda run, step: stop_at(3, step)):
        run_alone(tmp_path, *small)
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # it was killed
    (tmp_path / "checkpoints" / "step-00000003.partial").mkdir()
    run_alone(tmp_path, *small, "resume=auto")
    told = "the last start was cut off while it wrote step-00000003: resuming from "
    assert f"{told}{tmp_path}/checkpoints/step-00000002\n" in capsys.readouterr().out


def stop_at(end: int, step: int) -> None:
    if step == end:
        raise RuntimeError("killed")


@pytest.mark.parametrize("before", ["parsing", "composing", "building", "the first step"])
def test_errors_before_training_are_final(small, tmp_path, monkeypatch, before):
    given = {
        "parsing": ["--timeout=0"],
        "composing": ["steeps=1"],
        "building": ["optimizer.lr=-1"],
        "the first step": [f"directory={tmp_path}/file"],
    }[before]
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["train.py", *small, f"runs={tmp_path}/runs", *given])
    assert train.main() == FINAL


@pytest.mark.parametrize(
    ("error", "status"), [(RunError("x"), 1), (FinalError("x"), FINAL), (OSError("x"), 1)]
)
def test_errors_in_training_are_not_but_those_that_say_so(
    small, tmp_path, monkeypatch, request, error, status
):
    monkeypatch.setattr("sys.argv", ["train.py", *small, f"runs={tmp_path}/runs"])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # which an error leaves replaced
        handler = signal.getsignal(number)
        request.addfinalizer(lambda number=number, handler=handler: signal.signal(number, handler))

    def fail(run, step):
        raise error

    with around_steps(before=fail):
        assert train.main() == status
