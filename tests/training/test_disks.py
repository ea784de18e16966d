"""Checkpoints and logs on disks that are full or read-only."""

import os
import re
import subprocess

import pytest
import torch
from checkpoints import FIRST, SECOND, hashes, names, newest, saved, tensors
from logs import repeatable
from run import before_torchrun, launch
from workers.resume import run_alone

from training.workers import RunError


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, and a function that mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs to mount a file system: {done.stderr.strip()}")

    if os.geteuid():
        pytest.skip("needs root, to mount a file system")
    mount("size=900k")
    yield folder, lambda *options: mount("remount", *options)
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_on_a_full_disk_the_run_stops_and_can_go_on_later(small, disk):
    """Two workers' checkpoints of 600 kB each, of which one has room."""
    folder, mount = disk
    arguments = (*small, f"directory={folder}/run", "checkpoint.every=2")
    result = launch(2, *arguments, expect=1)
    errors = re.findall("^error:.*$", before_torchrun(result.stderr), re.MULTILINE)
    assert errors == [
        "error: the checkpoint step-00000004 could not be written: [Errno 28] No space left on "
        f"device; earlier ones in {folder}/run/checkpoints are as they were: see to the disk, and "
        "resume with resume=auto"
    ]
    assert "Traceback" not in before_torchrun(result.stderr)
    assert names(folder / "run" / "checkpoints") == [SECOND]
    end = repeatable(folder / "run")[-1]
    assert end["status"] == "failed" and "No space left" in end["error"]
    mount("size=9m")
    launch(2, *arguments, "resume=auto")
    log = repeatable(folder / "run")
    assert [r["step"] for r in log if r["record"] == "train"] == [1, 2, 3, 4]
    assert log[-1]["status"] == "completed"


def test_on_a_read_only_disk_it_stops_and_earlier_ones_stay(disk):
    folder, mount = disk
    checkpoints = saved(folder, 1)
    before = hashes(folder / FIRST)
    mount("ro")
    with pytest.raises(RunError, match=f"{SECOND} could not be written: .*Read-only file system"):
        checkpoints.save(2, tensors(2), {})
    mount("rw")
    assert newest(folder) == folder / FIRST and hashes(folder / FIRST) == before
    checkpoints.save(2, tensors(2), {})
    assert names(folder) == [FIRST, SECOND]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_on_a_full_disk_earlier_ones_stay(disk, asynchronous):
    folder, _ = disk
    checkpoints = saved(folder, 1, asynchronous=asynchronous)
    checkpoints.wait()
    large = {"large": torch.zeros(1_000_000)}
    with pytest.raises(RunError, match=r"could not be written: \[Errno 28\] No space left on dev"):
        checkpoints.save(2, large, {})
        checkpoints.wait()
    assert names(folder) == [FIRST] and newest(folder)


def test_without_room_for_the_log_the_error_names_it(small, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"No space left on device: .*/metrics\.jsonl"):
        run_alone(tmp_path, *small, "eval.every=4")
    assert not (tmp_path / "checkpoints").exists()
