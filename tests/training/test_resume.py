"""Runs that go on from a checkpoint exactly, and those that may not."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from logs import repeatable
from run import torchrun
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from workers.resume import ALL_CASES, CASES, COMMON, COMPRESSORS, MORE_CASES, run_alone

import training.data
import training.resume
from data.loader import Prefetched, TestWindows, WorkerBatches
from model import GPT
from training.config import build, compose
from training.data import open_data
from training.workers import RunError

LAYERS = [
    "embedding.weight",
    *(f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value", "project")),
    *(f"blocks.0.mlp.{part}.weight" for part in ("expand", "project")),
]
LAST = "checkpoints/step-00000004"
LOCAL_CASES = ["local", "local ef21, two ranks a worker", "diloco", "muloco", "sparseloco"]


def each(cases) -> list:
    """Of a test's cases those of MORE_CASES are slow: their runs are another launch."""
    return [pytest.param(one, marks=[pytest.mark.slow] * (one in MORE_CASES)) for one in cases]


@pytest.fixture(scope="module")
def cases(small, tmp_path_factory):
    """What `resume.py cases` leaves: two runs of two workers for every case."""
    directory = tmp_path_factory.mktemp("cases")
    torchrun("resume.py", "cases", directory, *small, ranks=2)
    return directory


@pytest.fixture(scope="module")
def more_cases(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("more-cases")
    torchrun("resume.py", "more cases", directory, *small, ranks=2)
    return directory


@pytest.fixture
def of_case(case, request) -> Path:
    """Where the two runs of the test's case are."""
    return request.getfixturevalue("more_cases" if case in MORE_CASES else "cases") / case


@pytest.fixture
def run(small):
    """Runs `run(directory, *overrides)` as one worker in this process; returns its records."""

    def run(directory: Path, *overrides: str) -> list[dict]:
        run_alone(directory, *small, *overrides)
        return repeatable(directory)

    return run


@pytest.fixture(scope="module")
def of_one_worker(small, tmp_path_factory):
    """A run of one worker in this process, with all its checkpoints."""
    directory = tmp_path_factory.mktemp("one") / "run"
    run_alone(directory, *small, "checkpoint.keep=4")
    return directory


@pytest.fixture
def whole(of_one_worker, tmp_path):
    """The records of that run, whose folder is copied to tmp_path."""
    shutil.copytree(of_one_worker, tmp_path, dirs_exist_ok=True)
    return repeatable(tmp_path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def facts(directory: Path) -> dict:
    return json.loads((directory / LAST / "checkpoint.json").read_text())


@pytest.mark.parametrize("case", each(ALL_CASES))
def test_a_resumed_run_is_the_run_without_interruption(of_case):
    both = [of_case / which for which in ("whole", "resumed")]
    whole, resumed = map(repeatable, both)
    assert [r["step"] for r in whole if r["record"] == "train"] == [1, 2, 3, 4]
    assert whole == resumed
    for file in ("__0_0.distcp", "__1_0.distcp"):  # parameters and all state
        assert sha256(both[0] / LAST / file) == sha256(both[1] / LAST / file)
    of_whole, of_resumed = map(facts, both)
    for key in ("config_hash", "workers", "placement", "data", "round"):
        assert of_whole[key] == of_resumed[key]
    assert of_whole["phases"] != of_resumed["phases"]  # it was another process's work


@pytest.mark.parametrize(
    "case", each([*(f"{kind}, sharded" for kind in COMPRESSORS), "natural, rank0"])
)
def test_a_checkpoint_holds_all_state(of_case, case, tmp_path):
    """As torch's own converter reads it."""
    dcp_to_torch_save(of_case / "whole" / LAST, tmp_path / "tensors.pt")
    tensors = torch.load(tmp_path / "tensors.pt", weights_only=True)
    names = [f"parameter.{layer}" for layer in LAYERS]
    names += [f"server.{layer}.server_gradient" for layer in LAYERS]
    if "rank0" not in case:  # where servers send the model whole
        names += [f"server.{layer}.server_model" for layer in LAYERS]
    for j in range(2):
        names += [f"worker.{j}.{layer}.momentum" for layer in LAYERS]
        names += [f"worker.{j}.{layer}.gradient_estimate" for layer in LAYERS]
        names += [f"worker.{j}.generator.{way}" for way in ("w2s", "s2w")]
    assert sorted(tensors) == sorted(names)


@pytest.mark.parametrize("case", each(LOCAL_CASES))
def test_in_the_middle_of_a_round_w_is_saved_and_tested_and_workers_are_apart(
    of_case, small, case, tmp_path
):
    """With rounds of three steps W after two is the model at the start."""
    directory = of_case / "whole"
    dcp_to_torch_save(directory / "checkpoints" / "step-00000002", tmp_path / "tensors.pt")
    tensors = torch.load(tmp_path / "tensors.pt", weights_only=True)
    config = compose((*small, *COMMON)).config
    start = GPT(build(config.model, "model"), config.seed)
    for layer, parameter in start.named_parameters():
        assert torch.equal(tensors[f"parameter.{layer}"], parameter)
        of_workers = [tensors[f"worker.{j}.{layer}.local_model"] for j in range(2)]
        assert not torch.equal(of_workers[0], parameter)
        assert torch.equal(*of_workers) == ("two ranks" in case)
    _, tokens = open_data(config)
    windows = TestWindows(tokens, config.model.context, config.eval.tokens)
    with torch.no_grad():
        losses = [start(*batch).item() for *batch, _ in windows.batches(0, 1, 1)]
    evals = [one for one in repeatable(directory) if one["record"] == "eval"]
    rounds = 2 if case == "sparseloco" else 1  # its second one has a step
    assert [(one["step"], one["round"]) for one in evals] == [(2, 0), (4, rounds)]
    assert evals[0]["test_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert evals[1]["test_loss"] < evals[0]["test_loss"] - 1e-3


def test_a_checkpoint_says_what_it_is_of(cases):
    directory = cases / "natural, rank0" / "whole"
    said = facts(directory)
    assert (said["schema"], said["step"], said["round"]) == (1, 4, 4)
    assert (said["workers"], said["placement"], len(said["data"])) == (2, "rank0", 2)
    *records, end = (directory / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert said["log_bytes"] == sum(map(len, records)) and b'"end"' in end
    assert said["position"].items() <= json.loads(records[-1]).items()
    files = {path.name: path for path in (directory / LAST).iterdir()}
    del files["checkpoint.json"]
    assert said["files"] == {name: sha256(path) for name, path in files.items()}
    hashes = {case: facts(cases / case / "whole")["config_hash"] for case in CASES}
    asynchronous = facts(cases / "asynchronous" / "resumed")["config_hash"]
    assert hashes["asynchronous"] == asynchronous and len(set(hashes.values())) == len(CASES)


def test_a_run_that_has_all_its_steps_only_ends(run, whole, tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert run(tmp_path, "resume=auto") == whole


def test_reading_ahead_changes_nothing(run, of_one_worker, tmp_path, monkeypatch):
    """As on CUDA, in a whole run and in one that goes on from its second step."""
    expected, ahead = repeatable(of_one_worker), tmp_path / "ahead"
    monkeypatch.setattr(
        training.data, "WorkerBatches", lambda *args: Prefetched(WorkerBatches(*args))
    )
    assert run(ahead, "checkpoint.keep=4") == expected
    for step in (3, 4):
        shutil.rmtree(ahead / f"checkpoints/step-{step:08}")
    assert run(ahead, "resume=auto") == expected
    assert facts(ahead)["data"] == facts(of_one_worker)["data"]


def test_without_a_checkpoint_the_run_starts_anew(run, whole, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints")
    assert run(tmp_path, "resume=auto") == whole


def test_a_log_that_was_lost_is_refused(run, whole, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"record": "run"}\n')
    with pytest.raises(RunError, match=r"is shorter than the \d+ bytes that the checkpoint knew"):
        run(tmp_path, "resume=auto")


def test_what_changes_the_numbers_is_refused(run, whole, tmp_path):
    before = sha256(tmp_path / "metrics.jsonl")
    changed = ("optimizer.lr=0.03", "w2s.fraction=0.2", "seed=1", "steps=8")
    message = (
        r"step-00000004 was made with another configuration: optimizer.lr=0.03 \(it has 0.02\), "
        r"seed=1 \(it has 0\), steps=8 \(it has 4\), w2s.fraction=0.2 \(it has 0.3\); give"
    )
    for resume in ("auto", "elastic"):
        with pytest.raises(RunError, match=message):
            run(tmp_path, f"resume={resume}", f"directory={tmp_path}", *changed)
    with pytest.raises(RunError, match=r"configuration: optimizer.server='rank0' \(it has 'auto'"):
        run(tmp_path, "resume=auto", "optimizer.server=rank0")
    with pytest.raises(RunError, match=r"w2s.values=None \(it has 'normal4'\); give"):
        run(tmp_path, "resume=auto", "compressor@w2s=identity")
    assert sha256(tmp_path / "metrics.jsonl") == before


def test_what_does_not_change_the_numbers_is_allowed(run, whole, tmp_path, monkeypatch):
    mirror, started = SimpleNamespace(log=lambda *_, **__: None, finish=lambda **_: None), []
    wandb = SimpleNamespace(init=lambda **options: started.append(options["mode"]) or mirror)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-0000000{step}")
    options = ("wandb.mode=offline", "label=other", "checkpoint.every=3", "check_every=1")
    resumed = run(tmp_path, "resume=auto", "log_every=3", "diagnostics_every=4", *options)
    assert resumed[:4] == whole[:4]  # the run, steps 1 and 2, and an evaluation
    assert [r["record"] for r in resumed[4:]] == ["train", "diagnostics", "train", "eval", "end"]
    assert resumed[-1] == whole[-1]
    assert started == ["offline"]


def test_another_number_of_workers_is_refused_with_a_hint(cases, run, tmp_path):
    shutil.copytree(cases / "randk, sharded" / "whole", tmp_path / "run")
    overrides = (*COMMON, *CASES["randk, sharded"])
    with pytest.raises(RunError, match="2 workers, this run has 1: start as many, or give resum"):
        run(tmp_path / "run", "resume=auto", *overrides)


def test_an_elastic_restart_needs_error_feedback_ef21(cases, run, tmp_path):
    shutil.copytree(cases / "ef14" / "whole", tmp_path / "run")
    place = ("resume=elastic", f"directory={tmp_path}/run")
    with pytest.raises(RunError, match=r"resume=elastic is not allowed for .*: it needs "):
        run(tmp_path / "run", *COMMON, *CASES["ef14"], *place)


@pytest.mark.parametrize("case", each(["local", "diloco", "muloco"]))
def test_local_steps_go_on_with_other_workers_from_the_middle_of_a_round(
    of_case, run, case, tmp_path, monkeypatch
):
    """One worker has the mean of what two had, and the servers' state as it was."""
    directory = tmp_path / "elastic"
    shutil.copytree(of_case / "whole", directory)
    shutil.rmtree(directory / LAST)
    log = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(log[:-1]))
    dcp_to_torch_save(directory / "checkpoints" / "step-00000002", tmp_path / "tensors.pt")
    saved = torch.load(tmp_path / "tensors.pt", weights_only=True)
    go_on, seen = training.resume.resume_elastic, {}

    def look(run, path):
        facts = go_on(run, path)
        for layer, parameter in run.raw_model.named_parameters():
            state = run.optimizer.state[parameter]
            seen[layer] = {key: tensor.clone() for key, tensor in state.items()}
            seen[layer]["local_model"] = parameter.detach().clone()
            for inner in run.optimizer.inner:
                own = inner.state[parameter].items()
                seen[layer] |= {f"inner.{key}": tensor.clone() for key, tensor in own}
        return facts

    monkeypatch.setattr(training.resume, "resume_elastic", look)
    place = ("resume=elastic", f"directory={directory}")
    records = run(directory, *COMMON, *ALL_CASES[case], *place)
    assert seen.keys() == set(LAYERS) and [r["record"] for r in records].count("elastic") == 1
    for layer, state in seen.items():
        own = {"global_params", "server_momentum", "local_model"}
        own |= set() if case == "diloco" else {"error"}  # that sends without feedback
        assert own <= state.keys()
        assert sum(key.startswith("inner.") for key in state) == 3  # M, G_j, G; or AdamW's
        for key, tensor in state.items():
            whole = {"global_params": "parameter.{}"}.get(key, f"server.{{}}.{key}")
            if whole.format(layer) in saved:
                expected = saved[whole.format(layer)]
            else:
                of_workers = [saved[f"worker.{j}.{layer}.{key}"].double() for j in range(2)]
                expected = sum(of_workers) / 2
            torch.testing.assert_close(tensor, expected.view_as(tensor).to(tensor.dtype))
