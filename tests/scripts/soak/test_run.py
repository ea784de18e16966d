"""A short soak, what it would not overlook, and that it leaves nothing behind."""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
from run import PATIENCE, ROOT
from waiting import wait_until

from scripts.faults import draws, outcome
from scripts.netns import requirements_missing
from scripts.soak import run
from scripts.soak.run import KINDS, details, disk_missing, full, new_disk

MISSING = requirements_missing() or disk_missing()
needs_root = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SOAK = ROOT / "scripts" / "soak" / "run.py"


@pytest.fixture
def overrides(small, tmp_path, monkeypatch):
    """For a soak whose temporary files go to tmp_path/tmp, and its results to tmp_path."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    data = [override for override in small if override.startswith("data.")]
    return [f"--out={tmp_path}", *data]


def left_behind(pid: int, tmp_path: Path) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines()
    mounts = [line for line in lines if str(tmp_path) in line]
    namespaces = Path("/var/run/netns").glob(f"ef21-{pid}-*")
    return [*mounts, *map(str, namespaces), *map(str, (tmp_path / "tmp").iterdir())]


@pytest.fixture
def said_in_soak(overrides, tmp_path, monkeypatch, forks):
    """What workers say in a soak with these faults, which they have to survive; all are forks."""
    # The machine may be slow: workers wait longer for one another.
    monkeypatch.setattr(run, "TIMEOUT", 60)
    monkeypatch.setattr(run, "LAUNCH_SECONDS", PATIENCE)

    def said(kinds: list[str], seed: int, *more: str) -> list[str]:
        options = [f"--faults={len(kinds)}", f"--kinds={','.join(kinds)}", f"--seed={seed}"]
        assert run.main([*options, *overrides, *more]) == 0
        *records, end = [json.loads(line) for line in (tmp_path / "soak.jsonl").open()]
        faults = [record for record in records if record["record"] == "fault"]
        assert sorted(fault["kind"] for fault in faults) == kinds
        assert any(record["record"] == "round" for record in records)
        assert end["equal"] and end["faults"] == len(kinds)
        assert "**yes**" in (tmp_path / "README.md").read_text()
        assert not left_behind(os.getpid(), tmp_path)
        return [line for fault in faults for line in fault["said"]]

    return said


@needs_root
def test_a_run_with_a_fault_equals_the_one_without(said_in_soak):
    """One that comes soon, by its seed."""
    said = " ".join(said_in_soak(["corrupt"], 10, "steps=30"))
    assert "ignored a damaged checkpoint" in said and "resuming from" in said


@needs_root
@pytest.mark.slow
def test_a_run_with_five_faults_equals_the_one_without(said_in_soak):
    said = " ".join(said_in_soak(["corrupt", "fill", "kill", "pause", "slow"], 4))
    for effect in ("No space left", "ignored a damaged checkpoint", "resuming from"):
        assert effect in said


@needs_root
@pytest.mark.slow
def test_an_interrupted_soak_leaves_nothing(overrides, tmp_path):
    """So many faults that it does not end by itself before."""
    process = subprocess.Popen(
        [sys.executable, SOAK, "--faults=99", *overrides],
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        log = "tmp/*/mounted/run/metrics.jsonl"
        wait_until(lambda: process.poll() is not None or list(tmp_path.glob(log)))
        assert process.poll() is None, process.communicate()
        assert left_behind(process.pid, tmp_path)
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert not left_behind(process.pid, tmp_path)


@needs_root
def test_a_disk_is_filled_and_freed_and_removed_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError), new_disk() as disk:
        (disk / "file").write_bytes(bytes(100_000))
        with full(disk), pytest.raises(OSError, match="No space left"):
            (disk / "other").write_bytes(bytes(100_000))
        (disk / "other").write_bytes(bytes(100_000))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir()) and str(tmp_path) not in Path("/proc/mounts").read_text()


def test_a_seed_gives_a_schedule_with_every_kind():
    def schedule_of(seed: int) -> list[dict]:
        given = Namespace(faults=2 * len(KINDS), kinds=",".join(KINDS), seed=seed)
        return draws(given, details)

    schedule = schedule_of(5)
    assert schedule == schedule_of(5) != schedule_of(6)
    assert sorted(draw["kind"] for draw in schedule) == sorted(2 * KINDS)


def test_runs_that_differ_in_more_than_time_are_not_equal(tmp_path):
    def make(name: str, loss: float, seconds: float, state: bytes) -> Path:
        checkpoint = tmp_path / name / "checkpoints" / "step-00000002"
        checkpoint.mkdir(parents=True)
        (checkpoint / "__0_0.distcp").write_bytes(state)
        record = {"record": "train", "loss": loss, "seconds": seconds}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return tmp_path / name

    expected = outcome(make("expected", 1.5, 2.0, b"state"))
    assert outcome(make("slower", 1.5, 3.0, b"state")) == expected
    assert outcome(make("another loss", 1.5000000000000002, 2.0, b"state")) != expected
    assert outcome(make("another state", 1.5, 2.0, b"State")) != expected
