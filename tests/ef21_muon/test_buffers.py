"""Running statistics, averaged or reported; see tests/support/workers/running_statistics.py."""

import json

import pytest
import torch
from run import torchrun
from torch import nn
from workers.running_statistics import EVERY, METHODS, STEPS, new_model

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.layers import Layer
from ef21_muon.transport.buffers import Buffers, own_statistics

FLOATS = 2 * 4 + 2 * 6 + 5  # the statistics of both layers, and a table of constants
LOCAL = [name for name in METHODS if name.startswith("local")]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("statistics")
    torchrun("running_statistics.py", directory, ranks=2)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_has_one_loss_on_all_workers(reports, name):
    losses = [report[f"{name} True"]["loss"] for report in reports]
    assert losses[0] == losses[1]
    diverged = [report[f"{name} False"]["loss"] for report in reports]
    assert diverged[0] != pytest.approx(diverged[1], rel=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_shared_is_the_mean_and_what_is_trained_stays(reports, name):
    """Running statistics are linear in those of batches, so that it does not matter when."""
    for report in reports:
        found, without = report[f"{name} True"], report[f"{name} False"]
        assert found["parameters"] == without["parameters"]
        assert found["counts"] == without["counts"] == [STEPS, STEPS]
    shared = [torch.tensor(report[f"{name} True"]["shared"]) for report in reports]
    assert torch.equal(*shared)
    if name not in LOCAL:
        own = torch.stack([torch.tensor(report[f"{name} False"]["own"]) for report in reports])
        torch.testing.assert_close(shared[0], own.mean(0))
    else:
        assert reports[0][f"{name} True"]["own"] != reports[1][f"{name} True"]["own"]
    assert torch.equal(shared[0][8:13], new_model()[3].angles), "constants to the bit"


@pytest.mark.parametrize("name", METHODS)
def test_their_bytes_count(reports, name):
    rounds = STEPS // EVERY if name in LOCAL else STEPS
    size = 4 * FLOATS * rounds
    for report in reports:
        found, without = report[f"{name} True"]["bytes"], report[f"{name} False"]["bytes"]
        more = [one - other for one, other in zip(found, without, strict=True)]
        assert more == [size, size, size]


@pytest.mark.parametrize("name", METHODS)
def test_who_does_not_average_them_is_warned_once(reports, name):
    (line,) = reports[0][f"{name} False"]["lines"]
    assert line.startswith("the running statistics of 1 (and 1 more) ") and "buffers=model" in line
    assert " (and 1 more) stay each worker's own" in line
    for report, averaged in ((reports[0], True), (reports[1], True), (reports[1], False)):
        assert report[f"{name} {averaged}"]["lines"] == []


@pytest.mark.parametrize("at", [4, 6])
def test_a_resumed_training_continues_with_them(reports, at):
    for report in reports:
        assert report[f"resumed {at}"]["shared"] == report["local True"]["shared"]
        assert report[f"resumed {at}"]["own"] == report["local True"]["own"]


def test_the_end_of_a_training_is_a_round_of_them(reports):
    assert reports[0]["finished"] == reports[1]["finished"]


def test_those_that_differ_at_first_are_named(reports):
    message = "1.running_mean differs between rank 0 and rank 1: all workers hold the same"
    for report in reports:
        assert report["diverged"].startswith(message)


@pytest.mark.parametrize("buffers", [True, "model", [torch.zeros(3)]])
def test_buffers_are_of_a_module(buffers):
    model = nn.Linear(2, 2)
    for make in (
        lambda: EF21Muon(model.parameters(), buffers=buffers),
        lambda: LocalSteps(torch.optim.SGD(model.parameters()), buffers=buffers),
        lambda: AveragedGradients(torch.optim.SGD(model.parameters()), buffers=buffers),
    ):
        with pytest.raises(ValueError, match=r"^buffers=\w+ is not allowed: give the model, or"):
            make()


def test_a_state_of_other_buffers_is_refused_before_anything_changes():
    states, optimizers = [], []
    for part in (lambda m: m[:2], lambda m: m, lambda m: nn.Sequential(*m[1:])):
        model = new_model()
        inner = torch.optim.SGD(model.parameters())
        optimizer = LocalSteps(inner, sync_every=1, buffers=nn.Sequential(part(model)))
        states.append(optimizer.state_dict())
        optimizers.append((model, optimizer))
    model, optimizer = optimizers[1]
    model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"^the state is of buffers '8 in 2 tensors' \(here '25 in"
    ):
        optimizer.load_state_dict(states[0])
    with pytest.raises(ValueError, match=r"^the state holds buffers .*: build it with the same b"):
        optimizer.load_state_dict(states[2])
    assert optimizer.steps == 1
    optimizer.load_state_dict(states[1])
    with optimizer.global_params():
        assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert not torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_worker_alone_has_its_own():
    model = new_model()
    optimizer = EF21Muon(model.parameters(), buffers=model, process_group=ALONE)
    model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    own = [buffer.clone() for buffer in model.buffers()]
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(own, model.buffers(), strict=True))


def test_workers_that_come_and_go_do_not_average_them():
    fleet = pytest.importorskip("ef21_muon.fleet", exc_type=ImportError)
    model = new_model()
    with pytest.raises(
        ValueError, match=r"^buffers are not averaged over workers that come and go"
    ):
        transport = fleet.Fleet(0, "http://localhost:1")
        LocalSteps(torch.optim.SGD(model.parameters()), transport=transport, buffers=model)


def frozen(module):
    return module.requires_grad_(False)


MODULES = {
    "with gains": (lambda: nn.BatchNorm1d(4), ["1"]),
    "without gains": (lambda: nn.BatchNorm1d(4, affine=False), ["1"]),
    "with frozen gains": (lambda: frozen(nn.BatchNorm1d(4)), ["1"]),
    "instance norm": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), ["1"]),
    "within another": (lambda: nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4)), ["1.1"]),
    "two": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)), 2 * [...]),
    "of batches alone": (lambda: nn.BatchNorm1d(4, track_running_stats=False), []),
    "synchronised": (lambda: nn.SyncBatchNorm(4), []),
    "none": (lambda: nn.LayerNorm(4), []),
}


@pytest.mark.parametrize("name", MODULES)
def test_running_statistics_of_the_trained_model_are_named(name):
    make, expected = MODULES[name]
    model = nn.Sequential(nn.Linear(3, 4), make(), nn.Linear(4, 1))
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))
    layers = [Layer(n, p, p.numel(), "error") for n, p in model.named_parameters()]
    found = own_statistics(layers, None)
    assert len(found) == len(expected) and (found == expected or ... in expected)
    assert own_statistics(layers, model) == [] and len(own_statistics(layers, other)) == len(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_buffer_that_is_no_longer_finite_stays_as_it_was(value):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    buffers = Buffers(model, ALONE)
    model[0].running_mean.copy_(torch.tensor([1.0, value, 3.0]))
    buffers.average()
    assert model[0].running_mean.tolist() == [1.0, 0.0, 3.0]
    assert model.mask.tolist() == [0.0, -float("inf")]
