"""What a user gets wrong is told in one line, ends with a status other than 0, and damages nothing.

The tables are in bad_overrides.py and bad_inputs.py. Torch lets nobody give a parameter a gradient
of another shape or type (the last test); what can be exchanged behind its back is in the tables.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import bad_inputs
import bad_overrides
import pytest
import torch
import torch.distributed as dist
from preloaded import start
from run import PATIENCE, ROOT, SMALL, before_torchrun, launch
from waiting import wait_until

import train
from training.gradients import GradientComputation
from training.workers import FINAL, Workers


@pytest.fixture(scope="module")
def pristine(small, tmp_path_factory):
    """The SCENE of bad_inputs.py."""
    scene = tmp_path_factory.mktemp("pristine")
    (scene / "data").mkdir()
    for option in small[-2:]:
        shutil.copy(option.partition("=")[2], scene / "data")
    with pytest.MonkeyPatch.context() as patch, handlers_kept():
        more = (f"directory={scene}/completed", "checkpoint.every=2")
        patch.setattr("sys.argv", ["train.py", *options(scene), *more])
        assert train.main() == 0
    shutil.copytree(scene / "completed", scene / "killed")
    shutil.rmtree(scene / "killed/checkpoints/step-00000004")
    log = scene / "killed/metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    return scene


@pytest.fixture
def scene(pristine, tmp_path):
    """One for a test to change."""
    return Path(shutil.copytree(pristine, tmp_path / "scene", symlinks=True))


@contextmanager
def handlers_kept():
    """A run that fails leaves SIGTERM and SIGINT without effect."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


def options(scene: Path) -> list[str]:
    data = (f"data.{which}={scene}/data/{which}.bin" for which in ("train", "test"))
    return [*SMALL, *data, f"runs={scene}/runs"]


def snapshot(scene: Path, apart_from: Path | None = None) -> dict[str, str]:
    """The rights of all that is there, and of files the SHA-256; but for new runs."""
    found = {}
    for path in sorted(scene.rglob("*")):
        if not path.is_relative_to(scene / "runs") and path != apart_from:
            whole = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else b""
            found[str(path)] = f"{path.stat().st_mode:o} {hashlib.sha256(whole).hexdigest()}"
    return found


def pattern(told: str, scene: Path) -> str:
    return ".*".join(map(re.escape, told.replace("SCENE", str(scene)).split(" ... ")))


def only_line(errors: str) -> str:
    """What a run said of its failure, without its progress; with the checkpoints it ignored."""
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.strip() and "tokens/s" not in line]
    ignored = [line for line in lines if line.startswith("ignored a damaged checkpoint: ")]
    (error,) = [line for line in lines if line not in ignored]
    assert error.startswith("error: ")
    return " ".join([*ignored, error])


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Run train.py in this process; it must answer `told`, and leave the scene as it was."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def refuse(
        scene: Path, given: str, told: str, rights=nullcontext, apart_from: Path | None = None
    ) -> None:
        if (scene / "configs").exists():
            monkeypatch.setattr("training.config.CONFIGS", scene / "configs")
        before = snapshot(scene, apart_from)
        arguments = [*options(scene), *given.replace("SCENE", str(scene)).split()]
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        with rights():
            status = train.main()
        assert status in (1, FINAL)
        line = only_line(capsys.readouterr().err)
        assert re.search(pattern(told, scene), line), line
        assert snapshot(scene, apart_from) == before
        assert not any(scene.glob("runs/*/test_loss.png"))

    with handlers_kept():
        yield refuse
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def in_a_process_group(monkeypatch):
    """Variables as torchrun sets them, for a process alone."""
    for name, value in (bad_inputs.MEET | {"MASTER_PORT": bad_inputs.free_port()}).items():
        monkeypatch.setenv(name, value)


@contextmanager
def without_rights_of_root():
    """Root may read and write what it likes; in here it may not (capabilities(7))."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    version_and_process = (ctypes.c_uint32 * 2)(0x20080522, 0)
    effective = (ctypes.c_uint32 * 6)()
    assert libc.capget(version_and_process, effective) == 0
    allowed = effective[0]
    effective[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(version_and_process, effective) == 0
    try:
        yield
    finally:
        effective[0] = allowed
        assert libc.capset(version_and_process, effective) == 0


OVERRIDES = (
    bad_overrides.COMMAND_LINES
    | bad_overrides.KEYS
    | bad_overrides.TYPES
    | bad_overrides.RANGES
    | bad_overrides.CHOICES
    | bad_overrides.SPECS
    | bad_overrides.CONTRADICTIONS
)


@pytest.mark.parametrize("given", OVERRIDES)
def test_overrides(refuse, pristine, monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path))  # without a login to wandb
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    refuse(pristine, given, OVERRIDES[given])


@pytest.mark.parametrize("given", bad_overrides.IN_A_PROCESS_GROUP)
def test_overrides_in_a_process_group(refuse, pristine, in_a_process_group, given):
    refuse(pristine, given, bad_overrides.IN_A_PROCESS_GROUP[given])


@pytest.mark.parametrize("what", bad_inputs.SHARDS)
def test_shards(refuse, scene, what):
    damage, told = bad_inputs.SHARDS[what]
    damage(scene / "data/train.bin")
    refuse(scene, "", told, without_rights_of_root)


@pytest.mark.parametrize("what", bad_inputs.WHILE_RUNNING)
def test_shards_while_they_are_read(refuse, scene, monkeypatch, what):
    damage, told = bad_inputs.WHILE_RUNNING[what]
    shard = scene / "data/train.bin"
    at_step_2 = bad_inputs.after_backward(2, lambda model: damage(shard))
    monkeypatch.setattr(GradientComputation, "compute", at_step_2)
    refuse(scene, "", told, apart_from=shard)
    assert last_record(scene)["status"] == "failed"


@pytest.mark.parametrize("what", bad_inputs.CHECKPOINTS)
def test_checkpoints(refuse, pristine, scene, what):
    damage, more, told = bad_inputs.CHECKPOINTS[what]
    damage(scene / "killed/checkpoints/step-00000002")
    same_data = " ".join(options(pristine)[-3:-1])
    given = f"directory=SCENE/killed resume=auto checkpoint.every=2 {same_data} {more}"
    refuse(scene, given, told, without_rights_of_root)


@pytest.mark.parametrize("what", bad_inputs.FILES)
def test_files(refuse, scene, what):
    prepare, given, told = bad_inputs.FILES[what]
    prepare(scene)
    refuse(scene, given, told, without_rights_of_root)


@pytest.mark.parametrize("what", bad_inputs.ENVIRONMENTS)
def test_environments(refuse, pristine, in_a_process_group, monkeypatch, what):
    variables, told = bad_inputs.ENVIRONMENTS[what]
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, value.replace("TAKEN", str(other.getsockname()[1])))
        in_vain = what in bad_inputs.WAIT_IN_VAIN
        refuse(pristine, f"--timeout={0.5 if in_vain else PATIENCE}", told)


def test_more_workers_than_gpus(refuse, pristine, in_a_process_group, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    told = "transport=device needs a GPU for each rank, and this machine, or another, has fewer ("
    refuse(pristine, "", told)


def test_a_rank_that_is_started_twice_is_told(pristine):
    """As threads, so that the second one surely comes while the first one waits."""
    store, first, second = dist.HashStore(), Workers(PATIENCE), Workers(0.2)
    for worker in (first, second):
        worker.rank, worker.count = 1, 2
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(first._agree_on_name, store)
        wait_until(lambda: store.check(["1"]))
        with pytest.raises(TimeoutError, match=r"rank 0 did not start within 0\.2 s: see that"):
            second._agree_on_name(store)
        with pytest.raises(ValueError, match="this rank was started twice: start every rank once"):
            waiting.result()


def test_of_processes_with_the_same_rank_those_left_over_end(pristine, tmp_path):
    """Which of the two goes on is a matter of time, as is what the other one meets with."""
    place = bad_inputs.MEET | {"WORLD_SIZE": "2", "MASTER_PORT": bad_inputs.free_port()}
    before = snapshot(pristine)
    more = ("--timeout=20", "steps=1", f"directory={tmp_path}/run")
    command = ["train.py", *options(pristine), *more]
    outputs = [(tmp_path / f"{number}.txt").open("w+") for number in range(3)]
    processes = [
        start(
            command,
            cwd=ROOT,
            env=os.environ | place | {"RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
        for rank, output in zip(("0", "1", "1"), outputs, strict=True)
    ]
    failed = []
    for process, output in zip(processes, outputs, strict=True):
        process.wait(PATIENCE)
        assert process.returncode in (0, 1)
        with output:
            output.seek(0)
            if process.returncode:
                failed.append(output.read())
    assert failed
    for errors in failed:
        assert errors.count("error: rank ") == 1 and "Traceback" not in errors
    assert snapshot(pristine) == before


def test_too_many_workers_for_the_data(pristine):
    before = snapshot(pristine)
    result = launch(2, *options(pristine), "model.context=7000", expect=1)
    errors = before_torchrun(result.stderr)
    told = (
        "error: 10000 training tokens over 2 workers leave 5000 tokens each, fewer than one window "
        "of 7001: use at most 1 workers\n"
    )
    assert errors.count("error:") == errors.count(told) == 1 and "Traceback" not in errors
    assert snapshot(pristine) == before


@pytest.mark.parametrize("what", bad_inputs.GRADIENTS)
def test_gradients(refuse, pristine, monkeypatch, what):
    damage, given, told = bad_inputs.GRADIENTS[what]

    def deed(model):
        damage(model.get_parameter(bad_inputs.NAME))

    at_step_2 = bad_inputs.after_backward(2, deed)
    monkeypatch.setattr(GradientComputation, "compute", at_step_2)
    refuse(pristine, f"{given} directory=SCENE/runs/{what.replace(' ', '-')}", told)
    end = last_record(pristine)
    assert end["status"] == "failed"


def last_record(scene: Path) -> dict:
    """Of the newest run."""
    logs = sorted((scene / "runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    return json.loads(logs[-1].read_text().splitlines()[-1])


def test_torch_refuses_gradients_that_do_not_fit():
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(RuntimeError, match="assign a gradient of size"):
        parameter.grad = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="assign a gradient with dtype"):
        parameter.grad = torch.zeros(3, 2, dtype=torch.float64)
