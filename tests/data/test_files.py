"""Files that appear whole, and folders that one process at a time writes."""

import errno
import os
import re
import signal
import subprocess
import sys

import pytest
from run import PATIENCE, ROOT

from data.files import LOCK, Claim, ClaimedError, whole_file

HOLD = """
import sys, time
from pathlib import Path
from data.files import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/folder."""
    command = [sys.executable, "-c", HOLD, tmp_path / "folder", str(PATIENCE)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "shard.bin"
    with whole_file(path) as first, whole_file(path) as second:
        first.write(b"a" * 1000)
        second.write(b"b" * 10)
        assert len(names(tmp_path)) == 2 and not path.exists()
    assert names(tmp_path) == ["shard.bin"]
    assert path.read_bytes() == b"a" * 1000  # the one that was done last


def test_after_an_error_the_earlier_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(path, "w") as file:
        file.write("half of it")
        raise ZeroDivisionError
    assert names(tmp_path) == ["manifest.json"] and path.read_text() == "before"


def test_a_held_folder_names_its_holder(tmp_path, holder):
    folder = tmp_path / "folder"
    message = f"{folder} is being written by process {holder.pid} on .* since 20.*: wait for its"
    with pytest.raises(ClaimedError, match=message):
        Claim(folder)
    with pytest.raises(FileExistsError):
        Claim(folder, new=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_death_releases(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait(PATIENCE)
    with Claim(tmp_path / "folder"):
        assert f'"process": {os.getpid()}' in (tmp_path / "folder" / LOCK).read_text()


def test_a_released_folder_can_be_held_again_and_empty_ones_go(tmp_path):
    folder = tmp_path / "some" / "folder"
    with Claim(folder, new=True):
        assert names(folder) == [LOCK]
        with pytest.raises(ClaimedError, match=re.escape(f"by process {os.getpid()} on ")):
            Claim(folder)
    assert not folder.exists()
    with Claim(folder):
        (folder / "log").touch()
    assert names(folder) == ["log"]


def test_what_a_killed_process_was_writing_goes(tmp_path):
    script = "import os; from pathlib import Path; from data.files import whole_file\n"
    script += "with whole_file(Path(os.sys.argv[1])) as file: file.write(b'half'); os._exit(9)"
    subprocess.run([sys.executable, "-c", script, tmp_path / "shard.bin"], cwd=ROOT)
    (tmp_path / "other.bin.partial").touch()  # of a download, which goes on there
    assert len(names(tmp_path)) == 2
    with Claim(tmp_path):
        assert names(tmp_path) == [LOCK, "other.bin.partial"]


def test_a_lock_that_was_replaced_meanwhile_is_not_taken_for_the_folder(tmp_path, monkeypatch):
    """As when its holder releases it between opening and locking."""
    lock, times = Claim._lock, []

    def released_meanwhile(self):
        lock(self)
        if not times:
            (tmp_path / LOCK).unlink()
        times.append(self)

    monkeypatch.setattr(Claim, "_lock", released_meanwhile)
    with Claim(tmp_path):
        assert len(times) == 2
        with pytest.raises(ClaimedError):
            Claim(tmp_path)


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("data.files.fcntl.flock", flock)
    with Claim(tmp_path):
        pass
    told = f"{tmp_path} cannot be locked (Function not implemented): let one process write it\n"
    assert capsys.readouterr().err == told
