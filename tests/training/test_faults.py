"""Workers that are killed, stopped or hung: what is left, and that resumed runs are equal."""

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from preloaded import TORCHRUN, start
from run import PATIENCE, ROOT, SUPPORT

from scripts.faults import outcome

FAULTS = SUPPORT / "workers" / "faults.py"
LOSSY = [
    *("compressor@w2s=topk", "w2s.fraction=0.1", "compressor@s2w=topk"),
    *("steps=6", "eval.every=3", "checkpoint.every=2", "resume=auto"),
]


def command(ranks: int, script: Path, *arguments: object, restarts: int = 0) -> list[str]:
    torchrun = [
        *(*TORCHRUN, "--standalone"),
        *(f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"),
    ]
    return [*(torchrun if ranks else []), str(script), *map(str, arguments)]


@contextmanager
def started(*arguments: object, **options: int) -> Iterator[tuple[object, TextIO]]:
    """A process of a `command`, which ends with it, and its output."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    reading, writing = os.pipe()
    with open(reading) as output:
        with open(writing, "w") as all_output:
            places = {"stdout": all_output, "stderr": all_output}
            process = start(command(*arguments, **options), cwd=ROOT, env=env, **places)
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        yield process, output
        process.wait()
        watchdog.cancel()


@pytest.fixture
def launch(small, tmp_path):
    """Run train.py on so many ranks, with faults, in tmp_path/run; returns status and output."""

    def launch(ranks: int, *faults: str, options: tuple[str, ...] = (), restarts: int = 0):
        run = [*small, *LOSSY, *options, f"directory={tmp_path}/run"]
        script = [FAULTS, tmp_path, ",".join(faults)] if faults else [ROOT / "train.py"]
        with started(ranks, *script, *run, restarts=restarts) as (process, lines):
            output = lines.read()
        assert all((tmp_path / fault).exists() for fault in faults), output
        return process.returncode, output

    return launch


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """The outcome of the run on two workers without faults."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run = [*small, *LOSSY, f"directory={directory}"]
    with started(2, ROOT / "train.py", *run) as (process, lines):
        output = lines.read()
    assert process.returncode == 0, output
    log, files = outcome(directory)
    assert log[-1]["status"] == "completed" and [r["step"] for r in log[1:]][-1] == 6
    assert sorted(files) == ["__0_0.distcp", "__1_0.distcp"]
    return log, files


def last_record(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def resumed_from(output: str) -> list[int]:
    return [int(step) for step in re.findall(r"resuming from .*step-(\d+)", output)]


def test_killed_and_hung_workers_are_restarted_and_leave_no_trace(small, undisturbed, tmp_path):
    """In the middle of a step, in the middle of a checkpoint; and one that was only slow.

    Who hangs does it before the other one's patience begins, and is killed as soon as it was named.
    """
    hang = "3:exchange:1:SIGSTOP"
    kills = ("4:write:1:SIGKILL", "5:exchange:0:SIGKILL")
    faults = (hang, "3:encode:0:lose_patience", *kills, "6:encode:1:pause")
    run = [*small, *LOSSY, f"directory={tmp_path}/run", "--timeout=1"]
    lines, named = [], []
    with started(2, FAULTS, tmp_path, ",".join(faults), *run, restarts=3) as (process, output):
        for line in output:
            lines.append(line)
            if line.startswith("error: rank 0: lost rank 1: ") and not named:
                named.append(line)
                os.kill(int((tmp_path / hang).read_text()), signal.SIGKILL)
    text = "".join(lines)
    assert process.returncode == 0 and all((tmp_path / one).exists() for one in faults), text
    assert "Timed out waiting 1000ms" in named[0]
    assert resumed_from(text) == [2, 2, 4]
    cut = re.findall("the last start was cut off([^:]*)[:,]", text)
    assert cut == [" while it wrote step-00000004", ""], text
    for survivor, killed in ((0, 1), (1, 0)):
        assert f"error: rank {survivor}: lost rank {killed}: see that process" in text
    assert outcome(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_killed_while_writing_asynchronously(launch, undisturbed, tmp_path):
    status, output = launch(
        *(2, "4:write:0:SIGKILL", "6:hash:1:exit", "6:publish:0:SIGKILL"),
        options=("checkpoint.asynchronous=true",),
        restarts=3,
    )
    assert status == 0, output
    steps = resumed_from(output)  # which checkpoint is whole by then is a matter of time
    assert len(steps) == 3 and steps[0] == 2 and steps == sorted(steps)
    assert outcome(tmp_path / "run") == undisturbed


def test_sigterm_to_a_worker_stops_all_with_a_checkpoint(launch, undisturbed, tmp_path):
    run = tmp_path / "run"
    status, output = launch(2, "2:exchange:1:SIGTERM")
    assert status == 0, output
    assert "stopped as asked: resume with resume=auto" in output
    stopped = last_record(run)
    assert stopped == {"record": "end", "status": "stopped", "step": 3}
    assert (run / "checkpoints" / "step-00000003").is_dir()

    status, output = launch(2)
    assert (status, resumed_from(output)) == (0, [3])
    assert outcome(run) == undisturbed


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_workers(launch, undisturbed, tmp_path):
    """It passes it on, and then says what ended it itself."""
    run = tmp_path / "run"
    status, output = launch(2, "4:encode:0:end_torchrun")
    assert "stopped as asked" in output and "SignalException" in output and status == 1
    step = last_record(run)["step"]
    assert step < 6

    status, output = launch(2)
    assert (status, resumed_from(output)) == (0, [step])
    assert outcome(run) == undisturbed


@pytest.mark.slow
def test_sigint_to_a_process_alone(launch, tmp_path):
    """Quick tests do it to their own process; see test_ends.py."""
    status, output = launch(0, "2:forward:0:SIGINT")
    assert status == 0, output
    assert last_record(tmp_path / "run") == {"record": "end", "status": "stopped", "step": 2}
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "the gradient of blocks.0.mlp.expand.weight was not finite at step 2"),
        pytest.param(
            ("optimizer=diloco", "optimizer.sync_every=2"),
            "blocks.0.mlp.expand.weight is not finite after",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_worker_whose_gradient_is_not_finite_is_named(launch, tmp_path, options, told):
    """Also where the loss is read some steps later, in which W of all would not be finite."""
    options = (*options, "log_every=4", "eval.every=4", "checkpoint.every=4", "check_every=0")
    status, output = launch(2, "2:forward:1:nan", options=options)
    assert status == 1
    assert f"error: rank 1: {told}" in output, output
    end = last_record(tmp_path / "run")
    assert end["status"] == "failed" and end["error"].startswith(f"rank 1: {told}")
