"""scripts/fleet.py: its command line, what it refuses, and what several workers print."""

import os
import signal
import socket
import subprocess
import sys
import time
from threading import Event
from types import SimpleNamespace

import preloaded
import pytest

from scripts import fleet
from scripts.supervise import GRACE
from training.records import read_log
from training.workers import FINAL

LOCAL = ["optimizer=local", "batch.global_size=6"]
WORKER = ["worker", "--number=0", "--workers=3", *LOCAL, "--lighthouse"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workers", "3", "--timeout", "60", "seed=1", "steps=9"],
        ["seed=1", "steps=9", "--workers", "3", "--timeout", "60"],
        ["seed=1", "--workers=3", "steps=9", "--timeout=60"],
        ["seed=1", "--workers=3", "--timeout=60", "steps=9"],
    ],
)
@pytest.mark.parametrize("part", ["start", "worker"])
def test_overrides_may_stand_on_both_sides_of_an_option(part, arguments):
    own = ["--number=1", "--lighthouse=http://first:29510"] if part == "worker" else []
    options = fleet.parse([part, *arguments, *own])
    assert (options.workers, options.timeout, options.ranks) == (3, 60, 1)
    assert options.overrides == ["seed=1", "steps=9"]


def test_what_workers_are_called_with():
    given = ["start", "--workers=2", "seed=1", "--timeout=1000000", "--ranks=2", "--port=7"]
    command = fleet.worker_command(fleet.parse(given), 1)
    assert command[0] == sys.executable and command[1].endswith("scripts/supervise.py")
    assert command[2:4] == ["--ranks=2", f"--shutdown-timeout={GRACE:g}"]
    assert command[4].endswith("train.py") and float(command[5].removeprefix("--timeout=")) == 1e6
    assert command[6:] == [
        *("membership=torchft", "membership.workers=2", "membership.worker=1"),
        *("membership.lighthouse=http://localhost:7", "ranks_per_worker=2", "seed=1"),
    ]
    without = fleet.worker_command(fleet.parse(["start", "--workers=2"]), 0, "script.py", "0.1")
    assert without[4:6] == ["script.py", "0.1"] and "--timeout" not in " ".join(without)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the following arguments are required: part"),
        (["stop"], "argument part: invalid choice: 'stop'"),
        (["start"], "the following arguments are required: --workers"),
        (
            ["start", "--workers=0"],
            "--workers: 0 is not allowed: give a whole number of at least 1",
        ),
        (["start", "--workers=two"], "--workers: two is not allowed: give a whole number"),
        (["start", "--workers=3", "--ranks=0"], "--ranks: 0 is not allowed: give a whole number"),
        (
            ["start", "--workers=3", "--port=0"],
            "--port: 0 is not allowed: give a whole number of 1",
        ),
        (
            ["start", "--workers=3", "--port=65536"],
            "65536 is not allowed: give a whole number of 1",
        ),
        (["lighthouse", "--workers=3", "--port=-1"], "-1 is not allowed: give a whole number"),
        (["lighthouse", "--workers=3", "--port=http"], "--port: http is not allowed: give a whole"),
        (["lighthouse", "--workers=3", "steps=1"], "unrecognized arguments: steps=1"),
        (["start", "--workers=3", "--timeout=0"], "--timeout: 0 s is not allowed: give a number"),
        (["start", "--workers=3", "--timeout=nan"], "--timeout: nan s is not allowed: give a"),
        (["start", "--workers=3", "--timeout=soon"], "--timeout: invalid seconds value: 'soon'"),
        (["start", "--workers=3", "--shutdown-timeout=-1"], "-1 s is not allowed: give a number"),
        (["start", "--workers=3", "steeps=1"], "steeps is not a key of this configuration"),
        (
            ["start", "--workers=3", "batch.global_size=7"],
            "batch.global_size=7 cannot be split over 3",
        ),
        (["start", "--workers=3", *LOCAL, "membership.host=nope.invalid"], "=nope.invalid has no"),
        (["start", "--workers=3", *LOCAL, "membership.host=a..b"], "membership.host=a..b has no"),
        (
            [*WORKER, "http://nope.invalid:29510"],
            "lighthouse=http://nope.invalid:29510 has no",
        ),
        (
            [*WORKER, "localhost:29510"],
            "lighthouse=localhost:29510 is not allowed: give http://HOST",
        ),
        ([*WORKER, "http://localhost"], "lighthouse=http://localhost is not allowed: give http://"),
        ([*WORKER, "http://localhost:99999"], "lighthouse=http://localhost:99999 is not allowed"),
        ([*WORKER, "http://localhost:1", "--number=3"], "membership.worker=3 is not allowed: give"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(given, message, capsys, monkeypatch):
    monkeypatch.setattr(fleet, "RESOLVER_SECONDS", 0.0)
    assert fleet.main(given) == FINAL
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


START = ["start", "--workers=3", *LOCAL]
ONE = [*WORKER, "http://localhost:1"]


@pytest.mark.parametrize(
    ("given", "override", "message"),
    [
        (START, "membership.workers=2", "give --workers 2"),
        (ONE, "membership.workers=2", "give --workers 2"),
        (START, "++membership.workers='2'", "give --workers 2"),
        (START, '+membership.workers="2"', "give --workers 2"),
        (START, "membership.workers=null", "leave it out"),
        (START, "~membership.workers", "leave it out"),
        (START, "~membership.workers=3", "leave it out"),
        (START, "membership.workers=1,2", "leave it out"),
        (START, "membership.worker=null", "leave it out"),
        (START, "membership@x=fixed", "leave it out"),
        (START, "membership.workers=${seed}", "give --workers ${seed}"),
        (START, "membership={workers:2}", "give --workers 2"),
        (START, "++membership={host:localhost,worker:0}", "leave it out"),
        (START, "membership.worker=0", "leave it out"),
        (START, "membership.worker=2", "leave it out"),
        (ONE, "membership.worker=2", "give --number 2"),
        (START, "membership.lighthouse=http://localhost:1", "leave it out"),
        (
            ONE,
            "++membership.lighthouse='http://localhost:2'",
            "give --lighthouse http://localhost:2",
        ),
        (START, "membership=fixed", "leave it out"),
        (START, "+membership=fixed", "leave it out"),
        (ONE, "membership='fixed'", "leave it out"),
        (ONE, "membership.name=fixed", "leave it out"),
        (START, "~membership", "leave it out"),
        (START, "ranks_per_worker=2", "give --ranks 2"),
        ([*START, "--ranks=2"], "++ranks_per_worker=3", "give --ranks 3"),
        ([*ONE, "--ranks=2"], "~ranks_per_worker", "leave it out"),
    ],
)
def test_an_override_of_what_an_option_says_is_refused(given, override, message, capsys):
    assert fleet.main([*given, override]) == FINAL
    assert capsys.readouterr().err == f"error: {override} is not allowed here: {message}\n"


@pytest.mark.parametrize(
    ("given", "override"),
    [
        (START, "membership.host=localhost"),
        (START, "++membership={host:localhost}"),
        (START, "membership.workers=3"),
        (START, "membership=torchft"),
        (START, "ranks_per_worker=1"),
        ([*START, "--ranks=2"], "ranks_per_worker=2"),
        (ONE, "membership.worker='0'"),
        (ONE, "membership.lighthouse=http://localhost:1"),
    ],
)
def test_an_override_that_says_the_same_as_an_option_is_not(given, override, monkeypatch):
    monkeypatch.setitem(fleet.PARTS, given[0], lambda options: 0)
    assert fleet.main([*given, override]) == 0


@pytest.mark.parametrize("part", ["start", "lighthouse"])
def test_a_port_that_is_taken_is_named(part, capsys):
    pytest.importorskip("torchft")
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        overrides = LOCAL if part == "start" else []
        assert fleet.main([part, "--workers=3", f"--port={port}", *overrides]) == FINAL
    error = capsys.readouterr().err
    assert error.startswith(f"error: the lighthouse cannot have port {port} (Address already in")
    assert error.count("\n") == 1


class Asked(Event):
    """In place of a request to stop by signals."""

    number = signal.SIGTERM
    status = 128 + signal.SIGTERM


# A worker: it prints, and ends with a status, or when it is asked to. One that fails has no table.
FAKE = """
import sys, time
number, status, *errors = sys.argv[1:]
if status in ("0", "waits"):
    print(f"worker {number} of up to 3\\n\\ntable", flush=True)
for error in errors:
    print(error, file=sys.stderr, flush=True)
if status == "waits":
    time.sleep(1000)
if status == "0":
    time.sleep(0.3)
    print("result", flush=True)
sys.exit(int(status))
"""
SAME = "error: the data is not there"


@pytest.fixture
def start(monkeypatch, capfd):
    """Run `start` with fake workers, who print these errors and end so; status, stdout, stderr."""

    def start(*workers: tuple, asked: bool = False):
        def command(options, number: int) -> list[str]:
            return [sys.executable, "-c", FAKE, str(number), *map(str, workers[number])]

        request = Asked()
        if asked:
            request.wait = lambda seconds: time.sleep(1) or request.set() or True
        monkeypatch.setattr(fleet, "worker_command", command)
        monkeypatch.setattr(fleet, "Request", lambda: request)
        lighthouse = SimpleNamespace(shutdown=lambda: None)
        monkeypatch.setattr(fleet, "new_lighthouse", lambda workers, port: lighthouse)
        monkeypatch.setattr(fleet, "OF_TOO_FEW", 1)
        monkeypatch.setattr(fleet, "TICK", 0.05)
        status = fleet.start(SimpleNamespace(workers=len(workers), port=1))
        printed = capfd.readouterr()
        return status, printed.out.splitlines(), sorted(printed.err.splitlines())

    return start


def of(worker: int) -> list[str]:
    """What is shown of a worker that completes."""
    lines = [f"worker {worker} of up to 3", "", "table", "result"]
    return [line and f"worker {worker}: {line}" for line in lines]


BAR = "step     20 of 600  loss 2.079, 4.5k tokens/s, 0.1 MB sent"
TOO_FEW = "error: fewer than a majority of the workers are left: all stop"


@pytest.mark.parametrize(
    ("workers", "status", "output", "errors"),
    [
        ([(0,), (0,), (0,)], 0, of(0), []),
        ([(0, "odd"), (0, "odd"), (0,)], 0, of(0), ["worker 0: odd", "worker 1: odd"]),
        ([(0, BAR), (0, BAR), (0, BAR)], 0, of(0), [f"worker 0: {BAR}"]),
        ([(0, "1%\r50%\r100%")], 0, of(0), ["worker 0: 100%"]),
        ([(FINAL, SAME), (FINAL, SAME), (FINAL, SAME)], FINAL, [], [f"worker W: {SAME}"]),
        ([(0,), (0,), (FINAL, SAME)], 1, of(0), [f"worker 2: {SAME}"]),
        ([(FINAL,), (FINAL,), (0,)], 1, of(2), []),
        ([(FINAL, SAME), (0,), (0,)], 1, of(1), [f"worker 0: {SAME}"]),
        ([("waits",), (FINAL,), (FINAL,)], 1, of(0)[:3], [TOO_FEW]),
        ([(0,), (3,)], 1, of(0), ["error: worker 1 did not complete: see its log"]),
    ],
)
def test_one_table_one_result_and_every_error_once(start, workers, status, output, errors):
    ended, shown, message = start(*workers)
    message = [
        line.replace(line[:9], "worker W:") if "W:" in str(errors) else line for line in message
    ]
    assert (ended, shown, message) == (status, output, errors)


def test_a_fleet_that_was_asked_to_stop_has_not_completed(start):
    status, shown, _ = start(("waits",), ("waits",), asked=True)
    assert status == 128 + signal.SIGTERM and shown == of(0)[:3]


def forked(command: list[str], **_) -> preloaded.Process | subprocess.Popen:
    """In place of subprocess.Popen, for workers of a fleet: a fork, with pipes."""
    pipes = [os.pipe() for _ in range(2)]
    writing = [os.fdopen(end, "wb") for _, end in pipes]
    process = preloaded.popen(command, *writing)
    process.stdout, process.stderr = (os.fdopen(end, "rb") for end, _ in pipes)
    for end in writing:
        end.close()
    return process


@pytest.mark.parametrize("popen", [forked, pytest.param(subprocess.Popen, marks=pytest.mark.slow)])
def test_a_fleet_on_this_machine(popen, small, tmp_path, monkeypatch, capfd):
    """Real workers: one table, of which nothing is sent back, one result, and every end record."""
    pytest.importorskip("torchft")
    monkeypatch.setattr("subprocess.Popen", popen)
    monkeypatch.setattr(fleet, "Request", Asked)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    own = [*LOCAL, "optimizer.sync_every=2", f"directory={tmp_path}/run"]
    command = ["start", "--workers=2", f"--port={port}", *small, "--timeout=600", *own]
    status = fleet.main(command)
    printed, errors = capfd.readouterr()
    assert status == 0, errors
    for line in filter(None, printed.splitlines()):
        assert line.startswith("worker 0: ")
    assert printed.count("  nothing  0") == 4 and "identity" not in printed
    assert printed.count("worker 0: result\n") == 1
    assert printed.count("test loss  ") == 1
    assert errors.count("step      4 of 4  loss") == 1
    for worker in ("worker0", "worker1"):
        log = read_log(tmp_path / "run" / worker / "metrics.jsonl")
        assert log.end["status"] == "completed"
