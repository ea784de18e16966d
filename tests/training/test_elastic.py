"""Going on with other workers and placements, and noticing that workers parted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from run import torchrun
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from workers.resume import DAMAGES, ELASTIC, LAYER, STARTS

LAYERS = 7
PARAMETERS = 256 * 32 + 12 * 32 * 32


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """What `resume.py elastic` leaves."""
    directory = tmp_path_factory.mktemp("elastic")
    longer = ("steps=8", "batch.global_size=6", "eval.tokens=192")
    torchrun("resume.py", "elastic", directory, *small, *longer, ranks=3)
    return directory


@pytest.fixture(scope="module")
def saved(runs, tmp_path_factory):
    """The tensors of the checkpoints that runs went on from, read by torch's own converter."""
    file = tmp_path_factory.mktemp("converted") / "checkpoint.pt"
    tensors = {}
    for start in STARTS:
        dcp_to_torch_save(runs / start / "checkpoints" / "step-00000004", file)
        tensors[start] = torch.load(file, weights_only=True)
    return tensors


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["record"] == kind]


@pytest.fixture(params=ELASTIC)
def elastic(request, runs, saved):
    """An elastic run: its start's tensors, what its workers went on with, and its records."""
    start, workers, _ = ELASTIC[request.param]
    directory = runs / request.param
    states = [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(workers)]
    return request.param, saved[start], states, records(directory)


def test_new_workers_hold_the_servers_estimate_and_the_mean_momentum(elastic):
    name, saved, states, _ = elastic
    before, _ = STARTS[ELASTIC[name][0]][:2]
    for state in states:
        momenta = [key for key in state if key.endswith(" momentum")]
        assert len(momenta) == LAYERS
        for key in momenta:
            layer = key.removesuffix(" momentum")
            estimate = saved[f"server.{layer}.server_gradient"]
            assert estimate.count_nonzero() > 0
            assert torch.equal(state[f"{layer} gradient_estimate"], estimate.view_as(state[key]))
            of_workers = [saved[f"worker.{j}.{layer}.momentum"].double() for j in range(before)]
            assert not torch.equal(*of_workers[:2])
            mean = np.mean([momentum.numpy() for momentum in of_workers], axis=0)
            np.testing.assert_allclose(state[key].numpy(), mean, rtol=1e-6, atol=1e-9)


def test_servers_and_parameters_go_on_unchanged_wherever_they_are(elastic):
    name, saved, states, _ = elastic
    kept = {key: tensor for key, tensor in saved.items() if key.startswith("server.")}
    assert len(kept) == (2 * LAYERS if "two-" in name else LAYERS)  # X, where s2w loses something
    for key, tensor in kept.items():
        _, layer_and_kind = key.split(".", 1)
        of_servers = [s[k] for s in states if (k := " ".join(layer_and_kind.rsplit(".", 1))) in s]
        sharded_or_rank0 = ELASTIC[name][2] != "replicated"
        assert len(of_servers) == (1 if sharded_or_rank0 else len(states))
        assert all(torch.equal(one, tensor) for one in of_servers)
    if ELASTIC[name][2] == "rank0":
        assert not any("server_gradient" in key for state in states[1:] for key in state)
    for state in states:
        parameters = {k.removesuffix(" parameter"): t for k, t in state.items() if "parameter" in k}
        assert len(parameters) == LAYERS
        assert all(torch.equal(t, saved[f"parameter.{name}"]) for name, t in parameters.items())


def test_the_log_names_the_bytes_of_the_change(elastic):
    name, _, _, log = elastic
    start, workers, placement = ELASTIC[name]
    (record,) = of_kind(log, "elastic")
    assert record == {
        "record": "elastic",
        "step": 4,
        "world_size_before": STARTS[start][0],
        "world_size": workers,
        "placement_before": "sharded",
        "placement": placement,
        "resync_bytes": 2 * 4 * PARAMETERS,  # G and the mean M_j
    }
    assert [r.get("step") for r in log[log.index(record) - 2 :]] == [4, 4, 4, 5, 6, 6, 7, 8, 8, 8]


def test_training_goes_on(elastic):
    """The run came to its end with the agreement checked after every step."""
    name, _, _, log = elastic
    assert log[-1]["status"] == "completed"
    losses = {record["step"]: record["test_loss"] for record in of_kind(log, "eval")}
    assert losses[8] < losses[4] < losses[2]
    trains = of_kind(log, "train")
    for sent in [r["w2s_bytes"] for r in trains], [r["tokens"] for r in trains]:
        assert [sent[0] * step for step in range(1, 9)] == sent
    received = np.diff([0, *(r["s2w_bytes"] for r in trains)])
    back = 0 if ELASTIC[name][2] == "replicated" else received[0]
    assert received.tolist() == [received[0]] * 4 + [back] * 4


@pytest.mark.parametrize("what", DAMAGES)
def test_workers_that_part_are_noticed(runs, what):
    log = records(runs / what)
    assert log[-1]["status"] == "failed"
    if what == "gradient estimate":
        told = f"the servers' gradient estimate of {LAYER} is not the mean"
        assert re.match(rf"rank \d: {told}", log[-1]["error"])  # the server's
    else:
        assert f"{LAYER} differs between rank 0 and rank 1" in log[-1]["error"]
    # Step 3 went wrong, at step 4 it was checked, and not saved.
    assert [record["step"] for record in of_kind(log, "train")] == [1, 2, 3]
    assert not list((runs / what).glob("checkpoints/*"))
