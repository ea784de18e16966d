"""A run beside a wandb that does not work: in its place a module that fails in every way."""

import json
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from logs import END, EVALS, RUN, write_log
from workers.resume import around_steps, run_alone

from scripts import to_wandb
from training.workers import RunError


class Fake:
    """In place of wandb: keeps what it is given, and does `deed` at each call of a name."""

    def __init__(self):
        self.deeds, self.inits, self.logged, self.finished = {}, [], [], []

    def init(self, **options):
        self.deeds.get("init", lambda: None)()
        self.inits.append(options)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, numbers, step):
        self.deeds.get("log", lambda: None)()
        self.logged.append((step, numbers))

    def _finish(self, exit_code=None):
        self.deeds.get("finish", lambda: None)()
        self.finished.append(exit_code)


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def failing(error):
    def deed():
        raise error

    return deed


def hang():
    threading.Event().wait()


def end_of(directory: Path) -> dict:
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])


OFFLINE = "wandb.mode=offline"
SHORT = ("steps=2", "checkpoint.every=0", "eval.tokens=64", OFFLINE)
LOST = "wandb stopped answering"
FAULTS = {
    "connection lost": ("log", failing(ConnectionResetError("Connection lost")), LOST),
    "closed mailbox": ("log", failing(Exception()), LOST),
    "two lines": ("log", failing(RuntimeError("one\ntwo")), f"{LOST} (one two)"),
    "leaves": ("log", failing(SystemExit(3)), f"{LOST} (3)"),
    "interrupts": ("log", failing(KeyboardInterrupt()), f"{LOST} (KeyboardInterrupt)"),
    "hangs": ("log", hang, "wandb did not end within 0.2 s"),
    "fails at the end": ("finish", failing(TimeoutError("timed out")), f"{LOST} (timed out)"),
    "hangs at the end": ("finish", hang, "wandb did not end within 0.2 s"),
}


@pytest.mark.parametrize("service", [None, "that of an earlier run"])
def test_a_run_starts_where_the_service_of_an_earlier_one_is_lost(
    small, tmp_path, fake, monkeypatch, service
):
    """As in a sweep; where wandb has none that it could have lost, it is not asked twice."""

    def connect():
        calls.append(os.environ.get("WANDB_SERVICE"))
        if len(calls) == 1:
            raise ConnectionResetError("Connection lost")

    calls, fake.deeds["init"] = [], connect
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    if service is None:
        with pytest.raises(RunError, match=r"does not start .Connection lost.:"):
            run_alone(tmp_path, *small, *SHORT)
        assert calls == [None]
        return
    monkeypatch.setenv("WANDB_SERVICE", service)
    run_alone(tmp_path, *small, *SHORT)
    assert calls == [service, None] and fake.logged
    assert end_of(tmp_path)["status"] == "completed"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_outlives_wandb(small, tmp_path, fake, monkeypatch, capsys, fault):
    monkeypatch.setattr("training.mirror.PATIENCE", 0.2)
    name, fake.deeds[name], told = FAULTS[fault]
    run_alone(tmp_path, *small, *SHORT)
    assert end_of(tmp_path)["status"] == "completed"
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    log = f": the log is in {tmp_path}/metrics.jsonl, upload it later with python scripts/to_wandb"
    assert len(warnings) == 1 and told in warnings[0] and log in warnings[0]


def test_a_wandb_that_takes_nothing_is_given_up(small, tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setattr("training.mirror.MOST_WAITING", 2)
    fake.deeds["log"] = hang
    run_alone(tmp_path, *small, *SHORT)
    assert end_of(tmp_path)["status"] == "completed"
    assert capsys.readouterr().err.count("warning: wandb has not taken 2 records: ") == 1


@pytest.fixture
def stopping():
    """In it, a run is asked to stop in its second step."""

    def stop(run, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def stopping():
        with around_steps(before=stop), suppress(AssertionError):  # it has not come to its end
            yield

    return stopping


def test_a_run_that_is_stopped_has_little_patience(
    small, tmp_path, fake, monkeypatch, capsys, stopping
):
    monkeypatch.setattr("training.mirror.SHORT_PATIENCE", 0.1)
    fake.deeds["finish"] = hang
    with stopping():
        run_alone(tmp_path, *small, OFFLINE)
    assert end_of(tmp_path)["status"] == "stopped"
    assert "warning: wandb did not end within 0.1 s: " in capsys.readouterr().err


def test_a_wandb_that_works_has_all_numbers(small, tmp_path, fake):
    run_alone(tmp_path, *small, *SHORT)
    assert [step for step, _ in fake.logged] == [1, 2, 2] and fake.finished == [0]
    assert fake.inits[0]["settings"] == {"console": "off"}, "so that no line is printed by it"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route"),
        *(
            pytest.param(error, marks=pytest.mark.slow)
            for error in (TypeError("an old one"), ImportError("None found"))
        ),
    ],
)
def test_what_does_not_start_is_refused_but_for_a_run_that_goes_on(
    small, tmp_path, fake, capsys, stopping, error
):
    fake.deeds["init"] = failing(error)
    with pytest.raises(RunError, match=f"offline does not start .{error}.: give wandb.mode=disab"):
        run_alone(tmp_path, *small, OFFLINE)
    assert not (tmp_path / "metrics.jsonl").exists()
    with stopping():
        run_alone(tmp_path, *small)
    assert end_of(tmp_path)["status"] == "stopped"
    run_alone(tmp_path, *small, OFFLINE, "resume=auto")
    assert end_of(tmp_path)["status"] == "completed"
    assert capsys.readouterr().err.count(f"warning: {OFFLINE} does not start ({error}): ") == 1


def test_a_new_run_has_an_id_of_its_own_and_keeps_it_when_it_goes_on(
    small, tmp_path, fake, stopping
):
    for folder in ("one", "one", "other"):  # in the same path, too
        with stopping():
            run_alone(tmp_path / folder, *small, OFFLINE, "resume=none")
    run_alone(tmp_path / "one", *small, OFFLINE, "resume=auto")
    *new, again = (one["id"] for one in fake.inits)
    assert len({*new}) == 3 and again == new[1]
    (tmp_path / "one/wandb_id").write_text("../no id")
    run_alone(tmp_path / "one", *small, OFFLINE, "resume=auto")
    assert fake.inits[-1]["id"] not in new


@pytest.mark.parametrize("name", ["init", "log", "finish"])
def test_an_upload_that_fails_is_one_line(tmp_path, fake, monkeypatch, capsys, name):
    write_log(tmp_path, {**RUN, "config": {}}, *EVALS, END)
    monkeypatch.setattr("sys.argv", ["to_wandb.py", str(tmp_path)])
    assert to_wandb.main() == 0 and fake.logged
    fake.deeds[name] = failing(Exception("Connection\nlost"))
    assert to_wandb.main() == 1
    told = "error: wandb did not take the run (Connection lost): start again when it answers, or "
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
