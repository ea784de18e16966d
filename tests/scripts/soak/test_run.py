"""A short soak, what it would not overlook, and that it leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
from run import PATIENCE, ROOT, SUPPORT
from waiting import wait_until

from scripts.faults import draws, outcome
from scripts.netns import requirements_missing
from scripts.soak.rounds import KINDS, disk_missing, full, new_disk
from scripts.soak.run import details

MISSING = requirements_missing() or disk_missing()
needs_root = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SOAK = ROOT / "scripts" / "soak" / "run.py"
PATIENT_SOAK = SUPPORT / "patient_soak.py"


@pytest.fixture
def start(small, tmp_path):
    """Start a soak; its temporary files go to tmp_path/tmp, its results to tmp_path."""
    (tmp_path / "tmp").mkdir()
    processes = []

    def start(script: Path, *options: str) -> subprocess.Popen:
        data = [override for override in small if override.startswith("data.")]
        process = subprocess.Popen(
            [sys.executable, script, *options, "--no-memory", f"--out={tmp_path}", *data],
            env=os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.terminate()
        process.wait()


def left_behind(process: subprocess.Popen, tmp_path: Path) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines()
    mounts = [line for line in lines if str(tmp_path) in line]
    namespaces = Path("/var/run/netns").glob(f"ef21-{process.pid}-*")
    return [*mounts, *map(str, namespaces), *map(str, (tmp_path / "tmp").iterdir())]


def said_in_soak(start, tmp_path, kinds: list[str], seed: int, *overrides: str) -> list[str]:
    """What workers say in a soak with these faults, which they have to survive."""
    options = [f"--faults={len(kinds)}", f"--kinds={','.join(kinds)}", f"--seed={seed}"]
    process = start(PATIENT_SOAK, *options, *overrides)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    *records, end = [json.loads(line) for line in (tmp_path / "soak.jsonl").open()]
    faults = [record for record in records if record["record"] == "fault"]
    assert sorted(fault["kind"] for fault in faults) == kinds
    assert any(record["record"] == "round" for record in records)
    assert end["equal"] and end["faults"] == len(kinds)
    assert "**yes**" in (tmp_path / "README.md").read_text()
    assert not left_behind(process, tmp_path)
    return [line for fault in faults for line in fault["said"]]


@needs_root
def test_a_run_with_a_fault_equals_the_one_without(start, tmp_path):
    """One that comes soon, by its seed."""
    said = " ".join(said_in_soak(start, tmp_path, ["corrupt"], 10, "steps=60"))
    assert "ignored a damaged checkpoint" in said and "resuming from" in said


@needs_root
@pytest.mark.slow
def test_a_run_with_five_faults_equals_the_one_without(start, tmp_path):
    said = " ".join(said_in_soak(start, tmp_path, ["corrupt", "fill", "kill", "pause", "slow"], 4))
    for effect in ("No space left", "ignored a damaged checkpoint", "resuming from"):
        assert effect in said


@needs_root
@pytest.mark.slow
def test_an_interrupted_soak_leaves_nothing(start, tmp_path):
    """So many faults that it does not end by itself before."""
    process, log = start(SOAK, "--faults=99"), "tmp/*/mounted/run/metrics.jsonl"
    wait_until(lambda: process.poll() is not None or list(tmp_path.glob(log)))
    assert process.poll() is None, process.communicate()
    assert left_behind(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert not left_behind(process, tmp_path)


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
