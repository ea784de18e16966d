"""Checkpoints as files: damage, full disks, asynchronous saving, and code where data should be."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from test_resume import repeatable
from test_train import before_torchrun, launch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from workers.resume import around_steps, run_alone

from training.checkpoint import Checkpoints, load, seal
from training.workers import RunError, Workers

FIRST, SECOND, THIRD = (f"step-0000000{step}" for step in (1, 2, 3))


def tensors(step: int) -> dict[str, torch.Tensor]:
    """Of several kinds; some are views of others' memory, as an optimizer's are."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(3, 40, 50, generator=generator)
    return {
        "first": batch[0],
        "last": batch[2],
        "half": batch[0].bfloat16(),
        "scalar": torch.tensor(float(step)),
        "generator": generator.get_state(),
    }


def saved(folder: Path, *steps: int, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, Workers(), **{"keep": 2, **options})
    for step in steps:
        checkpoints.save(step, tensors(step), {})
    return checkpoints


def newest(folder: Path) -> Path | None:
    """For a process that comes later."""
    return Checkpoints(folder, Workers(), keep=2).newest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(path: Path) -> dict[str, str]:
    """Of the tensors' files."""
    return {file.name: sha256(file) for file in path.glob("*.distcp")}


def require_whole(path: Path, step: int) -> None:
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors(step).items()}
    load(path, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(step).items())


def test_what_was_saved_is_loaded_and_the_last_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert names(tmp_path) == [SECOND, THIRD]
    require_whole(newest(tmp_path), 3)
    require_whole(tmp_path / SECOND, 2)
    with pytest.raises(RunError, match=f"{THIRD} does not fit this run: .*other"):
        load(tmp_path / THIRD, {"other": torch.zeros(2)})
    with pytest.raises(RunError, match=f"{THIRD} does not fit this run: .*[Ss]ize"):
        load(tmp_path / THIRD, {"first": torch.zeros(2, 2)})


def test_without_any_there_is_no_newest(tmp_path):
    assert newest(tmp_path / "none") is None


# Damage


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)


def replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def rewrite_facts(path: Path, **changed) -> None:
    facts = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(seal(facts | changed)))


DAMAGES = {
    "tensors": (
        lambda path: flip(path / "__0_0.distcp", 0.5),
        "__0_0.distcp is not what was written",
    ),
    "metadata": (
        lambda path: flip(path / ".metadata", 0.9),
        ".metadata is not what was written",
    ),
    "no tensors": (
        lambda path: (path / "__0_0.distcp").unlink(),
        "No such file or directory: .*__0_0.distcp",
    ),
    "no metadata": (
        lambda path: (path / ".metadata").unlink(),
        "No such file or directory: .*.metadata",
    ),
    "no facts": (
        lambda path: (path / "checkpoint.json").unlink(),
        "No such file or directory: .*checkpoint.json",
    ),
    "facts": (
        lambda path: replace(path / "checkpoint.json", b'"step": 2', b'"step": 3'),
        "checkpoint.json is not what was written",
    ),
    "facts cut off": (
        lambda path: os.truncate(path / "checkpoint.json", 99),
        "checkpoint.json is damaged",
    ),
    "facts of another kind": (
        lambda path: rewrite_facts(path, files=[]),
        "checkpoint.json is damaged",
    ),
    "another schema": (
        lambda path: rewrite_facts(path, schema=2),
        f"{SECOND} has schema 2, this version reads 1",
    ),
    "a file outside": (
        lambda path: rewrite_facts(path, files={"../outside": sha256(path.parent / "outside")}),
        "outside is not what was written",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_it_used(tmp_path, capsys, what):
    damage, message = DAMAGES[what]
    (tmp_path / "outside").write_text("in reach")
    saved(tmp_path, 1, 2)
    damage(tmp_path / SECOND)
    assert newest(tmp_path) == tmp_path / FIRST
    told = capsys.readouterr().err
    assert re.fullmatch(f"ignored a damaged checkpoint: .*{SECOND}.*\n", told)
    assert re.search(message, told)


def test_if_all_are_damaged_it_is_an_error(tmp_path, capsys):
    saved(tmp_path, 1, 2)
    for name in (FIRST, SECOND):
        flip(tmp_path / name / "__0_0.distcp", 0.3)
    with pytest.raises(RunError, match=f"no checkpoint in {tmp_path} is whole: remove it to start"):
        newest(tmp_path)
    assert capsys.readouterr().err.count("ignored a damaged checkpoint") == 2


def test_what_was_not_finished_is_ignored_and_goes_with_the_next(tmp_path, capsys):
    saved(tmp_path, 1, 3)
    (tmp_path / THIRD).rename(tmp_path / f"{THIRD}.partial")
    assert newest(tmp_path) == tmp_path / FIRST
    assert capsys.readouterr().err == ""
    saved(tmp_path, 2)
    assert names(tmp_path) == [FIRST, SECOND]


def test_damaged_ones_do_not_count_among_those_kept(tmp_path):
    saved(tmp_path, 1, 3)
    flip(tmp_path / THIRD / "__0_0.distcp", 0.3)
    later = Checkpoints(tmp_path, Workers(), keep=1)
    assert later.newest() == tmp_path / FIRST
    later.save(2, tensors(2), {})
    assert names(tmp_path) == [SECOND]
    require_whole(tmp_path / SECOND, 2)


def test_a_run_goes_on_from_the_one_before_a_damaged_one(small, tmp_path, capsys):
    run_alone(tmp_path, *small)
    whole = repeatable(tmp_path)
    flip(tmp_path / "checkpoints" / "step-00000004" / "__0_0.distcp", 0.3)
    run_alone(tmp_path, *small, "resume=auto")
    assert repeatable(tmp_path) == whole
    told = capsys.readouterr()
    assert "step-00000004/__0_0.distcp is not what was written" in told.err
    assert f"going on from {tmp_path}/checkpoints/{THIRD}\n" in told.out


# Asynchronous saving


@pytest.fixture
def slow_disk(monkeypatch):
    """Nothing is written before the event is set."""
    event = threading.Event()
    write = FileSystemWriter.write_data

    def wait_and_write(*arguments):
        assert event.wait(20)
        return write(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", wait_and_write)
    return event


def test_an_asynchronous_one_is_of_its_moment_and_appears_when_written(tmp_path, slow_disk):
    checkpoints = saved(tmp_path / "later", asynchronous=True)
    state = tensors(1)
    checkpoints.save(1, state, {})
    for tensor in state.values():  # training goes on
        tensor.zero_()
    checkpoints.poll()
    assert names(tmp_path / "later") == [f"{FIRST}.partial"]
    assert newest(tmp_path / "later") is None  # if it ends here
    slow_disk.set()
    checkpoints.settle()
    assert names(tmp_path / "later") == [FIRST]
    require_whole(newest(tmp_path / "later"), 1)
    saved(tmp_path / "at once", 1)
    assert hashes(tmp_path / "later" / FIRST) == hashes(tmp_path / "at once" / FIRST)


def test_an_asynchronous_one_appears_at_a_poll_or_a_later_save(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, asynchronous=True)
    assert FIRST in names(tmp_path)
    checkpoints._pending[2].result()
    checkpoints.poll()
    assert names(tmp_path) == [FIRST, SECOND]


def test_after_an_error_an_asynchronous_one_still_appears(small, tmp_path, slow_disk):
    def stop(run, step):
        if step == 2:
            slow_disk.set()
            raise RunError("stopped")

    with pytest.raises(RunError, match="stopped"), around_steps(before=stop):
        run_alone(tmp_path, *small, "checkpoint.asynchronous=true")
    assert names(tmp_path / "checkpoints") == [FIRST]
    assert newest(tmp_path / "checkpoints")


# Disks


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
        "go on with resume=auto"
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
    checkpoints.settle()
    large = {"large": torch.zeros(1_000_000)}
    with pytest.raises(RunError, match=r"could not be written: \[Errno 28\] No space left on dev"):
        checkpoints.save(2, large, {})
        checkpoints.settle()
    assert names(folder) == [FIRST] and newest(folder)


def test_without_room_for_the_log_the_error_names_it(small, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"No space left on device: .*/metrics\.jsonl"):
        run_alone(tmp_path, *small, "eval.every=4")
    assert not (tmp_path / "checkpoints").exists()


# Trust


class Touch:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def forge(path: Path, change) -> None:
    """Let `change(metadata)` edit .metadata, and make its hash fit."""
    metadata = FileSystemReader(path).read_metadata()
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    trust(path, ".metadata")


def trust(path: Path, name: str) -> None:
    facts = json.loads((path / "checkpoint.json").read_text())
    rewrite_facts(path, files=facts["files"] | {name: sha256(path / name)})


def refused(folder: Path) -> str:
    """Why the newest checkpoint, whole by its hashes, is not loaded."""
    path = newest(folder)
    assert path == folder / FIRST
    with pytest.raises(RunError) as error:
        load(path, tensors(1))
    return str(error.value)


def test_code_in_the_metadata_is_not_run(tmp_path):
    saved(tmp_path / "run", 1)
    path, proof = tmp_path / "run" / FIRST, tmp_path / "proof"
    forge(path, lambda metadata: setattr(metadata, "planner_data", Touch(proof)))
    assert "posix.system has no place in a checkpoint" in refused(tmp_path / "run")
    assert not proof.exists()
    FileSystemReader(path).read_metadata()
    assert proof.exists()  # so the metadata was dangerous


def test_code_in_a_tensor_s_place_is_not_run(tmp_path):
    saved(tmp_path / "run", 1)
    path, proof = tmp_path / "run" / FIRST, tmp_path / "proof"
    content = io.BytesIO()
    torch.save(Touch(proof), content)
    (path / "__0_0.distcp").write_bytes(content.getvalue())
    trust(path, "__0_0.distcp")

    def point_there(metadata):
        for stored in metadata.storage_data.values():
            stored.offset, stored.length = 0, len(content.getvalue())

    forge(path, point_there)
    assert "weights_only" in refused(tmp_path / "run").lower() and not proof.exists()

    def make_bytes(metadata):  # which torch.distributed.checkpoint would unpickle freely
        for name in metadata.state_dict_metadata:
            metadata.state_dict_metadata[name] = BytesStorageMetadata()

    forge(path, make_bytes)
    assert "BytesStorageMetadata has no place in a checkpoint" in refused(tmp_path / "run")
    assert not proof.exists()


@pytest.mark.parametrize("outside", ["../other.distcp", "/etc/hostname", "..", "a/b"])
def test_a_checkpoint_does_not_reach_outside(tmp_path, outside):
    saved(tmp_path, 1)
    shutil.copy(tmp_path / FIRST / "__0_0.distcp", tmp_path / "other.distcp")

    def reach(metadata):
        for stored in metadata.storage_data.values():
            stored.relative_path = outside

    forge(tmp_path / FIRST, reach)
    assert f"refers to {outside}, outside of it" in refused(tmp_path)
