"""scripts/supervise.py: what is started again, what is not, and how a worker is asked to stop."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from run import PATIENCE, ROOT
from waiting import wait_until

from scripts import supervise
from training.workers import FINAL

# Counts starts in a file of each rank, and does a deed of the list: one for each start.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
folder, deeds = Path(sys.argv[1]), sys.argv[2].split(",")
rank = os.environ["RANK"]
file = folder / rank
start = len(file.read_text()) if file.exists() else 0
if deeds[start] in ("graceful", "stubborn"):
    def answer(*_):
        if deeds[start] == "graceful":
            (folder / f"{rank}.checkpoint").touch()
            sys.exit(0)
    signal.signal(signal.SIGTERM, answer)
file.write_text((start + 1) * "x")
(folder / "environment").write_text(" ".join(
    os.environ[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")))
if deeds[start] == "wait" or deeds[start] in ("graceful", "stubborn"):
    time.sleep(1000)
kind, _, where = deeds[start].partition("@")
if where and rank != where:
    time.sleep(1000)
while where and not all((folder / one).exists() for one in "01"):
    time.sleep(0.01)
if kind.startswith("SIG"):
    os.kill(os.getpid(), signal.Signals[kind])
sys.exit(int(kind))
"""


def start(folder: Path, deeds: str, *options: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, ROOT / "scripts" / "supervise.py", *options]
    return subprocess.Popen(
        [*command, folder / "script.py", folder, deeds], stderr=subprocess.PIPE, text=True
    )


def test_what_is_started_again(tmp_path):
    """All at once, since they pause for most of their time."""
    again = "ended with {} after 0 s: starting again in 1 s"
    cases = {
        "0": (0, 1, ""),
        "78": (FINAL, 1, ""),
        "1,0": (0, 2, again.format("status 1")),
        "SIGKILL,0": (0, 2, again.format("SIGKILL")),
        "SIGTERM,0": (0, 2, again.format("SIGTERM")),
        "SIGSEGV,78": (FINAL, 2, again.format("SIGSEGV")),
    }
    processes = {deeds: start(tmp_path / deeds, deeds) for deeds in cases}
    for deeds, (status, starts, message) in cases.items():
        _, errors = processes[deeds].communicate(timeout=PATIENCE)
        found = re.sub(r"after \d s", "after 0 s", errors.strip())
        assert (processes[deeds].returncode, found) == (status, message)
        assert len((tmp_path / deeds / "0").read_text()) == starts


def test_ranks_end_together_and_start_together(tmp_path):
    cases = {"1@1,0": 0, "78@0": FINAL, "78@1": FINAL}
    processes = {deeds: start(tmp_path / deeds, deeds, "--ranks=2") for deeds in cases}
    for deeds, status in cases.items():
        processes[deeds].communicate(timeout=PATIENCE)
        assert processes[deeds].returncode == status
        first, second = ((tmp_path / deeds / rank).read_text() for rank in "01")
        assert first == second and len(first) == len(deeds.split(","))
        assert (tmp_path / deeds / "environment").read_text().startswith("2 2 127.0.0.1 ")


def test_a_request_to_stop_is_passed_on_and_nothing_starts_again(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    folders = [tmp_path / number.name for number in numbers]
    processes = [start(folder, "graceful,0", "--ranks=2") for folder in folders]
    for number, folder, process in zip(numbers, folders, processes, strict=True):
        wait_until(lambda folder=folder: (folder / "0").exists() and (folder / "1").exists())
        process.send_signal(number)
    for number, folder, process in zip(numbers, folders, processes, strict=True):
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (128 + number, "")
        assert (folder / "0.checkpoint").exists() and (folder / "1.checkpoint").exists()


def test_what_does_not_end_in_time_is_killed_and_the_line_says_so(tmp_path):
    process = start(tmp_path, "stubborn,0", "--shutdown-timeout=0.5")
    wait_until(lambda: (tmp_path / "0").exists())
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == (
        "error: killed, since it had not ended 0.5 s after it was asked to stop: the next start "
        "uses the newest checkpoint; give a longer --shutdown-timeout\n"
    )


def test_a_request_to_stop_ends_a_pause(tmp_path):
    process = start(tmp_path, "1,1,1,1,1,0")
    wait_until(lambda: (tmp_path / "0").exists() and len((tmp_path / "0").read_text()) == 2)
    time.sleep(0.3)  # it has ended for the second time, and pauses for 2 s
    process.terminate()
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM


def test_under_nohup_sighup_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        asked = supervise.Request()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not asked.is_set()
    finally:
        for number, handler in [*others, (signal.SIGHUP, before)]:
            signal.signal(number, handler)


@pytest.fixture
def live(monkeypatch):
    """Supervise lives of so many seconds, which end in failures but for a last one; the pauses."""
    pauses = []

    def live(lives: list[float], completes: bool) -> tuple[int, list[float]]:
        now, left, request = [0.0], list(lives), SimpleNamespace()
        request.is_set, request.wait = lambda: False, pauses.append

        def run_once(*_) -> list[int]:
            now[0] += left.pop(0)
            return [int(bool(left) or not completes)]

        monkeypatch.setattr(supervise, "Request", lambda: request)
        monkeypatch.setattr(supervise, "run_once", run_once)
        monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=lambda: now[0]))
        return supervise.supervise([], 1, 0.0), pauses

    return live


def test_restarts_come_later_and_later_but_at_once_after_a_long_life(live, capsys):
    status, pauses = live([5, 5, 5, 5, 5, 5, 5, 5, 100, 5, 5], completes=True)
    assert status == 0 and pauses == [1, 2, 4, 8, 16, 32, 60, 60, 0, 1]
    assert "ended with status 1 after 100 s: starting again now" in capsys.readouterr().err


def test_what_never_lives_long_is_given_up_in_the_end(live, capsys):
    status, pauses = live([5.0] * 50 + [61.0] + [5.0] * 100, completes=False)
    assert status == 1 and len(pauses) == 150
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: given up: it ended 100 times within 60 s of its start"
    assert 3600 < sum(pauses[51:]) < 7200
