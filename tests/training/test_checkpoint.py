"""Checkpoints as files: which are kept, damage, and asynchronous saving."""

import os
import re
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import (
    FIRST,
    SECOND,
    THIRD,
    flip,
    hashes,
    names,
    newest,
    require_whole,
    rewrite_facts,
    saved,
    sha256,
    tensors,
)
from logs import repeatable
from run import PATIENCE
from torch.distributed.checkpoint import FileSystemWriter
from workers.resume import around_steps, run_alone

from training.checkpoint import Checkpoints, load
from training.workers import RunError, Workers


def test_what_was_saved_is_loaded_and_the_last_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert names(tmp_path) == [SECOND, THIRD]
    require_whole(newest(tmp_path), 3)
    require_whole(tmp_path / SECOND, 2)
    with pytest.raises(RunError, match=f"{THIRD} does not fit this run: .*other"):
        load(tmp_path / THIRD, {"other": torch.zeros(2)})
    with pytest.raises(RunError, match=f"{THIRD} does not fit this run: .*[Ss]ize"):
        load(tmp_path / THIRD, {"first": torch.zeros(2, 2)})


def test_what_users_keep_beside_them_stays(tmp_path, capsys):
    saved(tmp_path, 1)
    beside = ["notes", "step-00000001-best", "step-best", "step-00000002.partial-of-mine"]
    for name in beside:
        (tmp_path / name).mkdir()
    files = ["step-1", "step-00000001.tar.gz", "a-step-00000001"]
    for name in files:
        (tmp_path / name).touch()
    saved(tmp_path, 2, 3)
    assert {path.name for path in tmp_path.iterdir()} == {*beside, *files, SECOND, THIRD}
    assert newest(tmp_path) == tmp_path / THIRD
    assert not capsys.readouterr().err


def test_an_old_one_that_cannot_be_removed_is_named_and_left(tmp_path, monkeypatch, capsys):
    saved(tmp_path, 1, 2)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("training.checkpoint.shutil.rmtree", refuse)
        saved(tmp_path, 3)
    assert names(tmp_path) == [FIRST, SECOND, THIRD]
    assert f"left an old checkpoint: [Errno 13] Permission denied: '{tmp_path / FIRST}'" in (
        capsys.readouterr().err
    )
    require_whole(newest(tmp_path), 3)


def test_without_any_there_is_no_newest(tmp_path):
    assert newest(tmp_path / "none") is None


# Damage


def replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


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
    with pytest.raises(
        RunError, match=f"every checkpoint in {tmp_path} is damaged: remove the folder"
    ):
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
    assert f"resuming from {tmp_path}/checkpoints/{THIRD}\n" in told.out


# Asynchronous saving


@pytest.fixture
def slow_disk(monkeypatch):
    """Nothing is written before the event is set."""
    event = threading.Event()
    write = FileSystemWriter.write_data

    def wait_and_write(*arguments):
        assert event.wait(PATIENCE)
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
    checkpoints.wait()
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
