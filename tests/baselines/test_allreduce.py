"""Baselines behind DDP on two workers; see tests/support/workers/allreduce.py."""

import copy

import numpy as np
import pytest
import torch
from run import torchrun
from workers import allreduce
from workers.allreduce import SHAPES, STEPS

import baselines
from baselines import AdamW, AllReduced, Muon

ENTRIES = sum(m * n for m, n in SHAPES)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("allreduce")
    torchrun("allreduce.py", directory, ranks=2)
    return [dict(np.load(directory / f"rank{rank}.npz")) for rank in range(2)]


def apart(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other)


def whole_batch(optimizer_of):
    """Final parameters of one process that sees the data of both workers."""
    model = allreduce.new_model()
    optimizer = optimizer_of(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            inputs, targets = allreduce.batch(rank, step)
            ((model(inputs) - targets).square().mean() / 2).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def test_adamw_is_torchs_on_the_whole_batch(ranks):
    def build(weight_decay):
        return lambda p: torch.optim.AdamW(p, 0.01, (0.9, 0.95), weight_decay=weight_decay)

    found = ranks[0]["adamw parameters"]
    assert apart(found, whole_batch(build(0.1))) < 1e-5
    assert apart(found, whole_batch(build(0.0))) > 1e-4


def test_muon_is_ef21_muon_without_compression(ranks):
    assert apart(ranks[0]["muon parameters"], ranks[0]["ef21 parameters"]) < 1e-4


@pytest.mark.parametrize(
    ("hook", "least", "most"),
    [("float16", 1e-7, 1e-2), ("powersgd", 1e-2, 1), ("greedylore", 1e-2, 1)],
)
def test_hooks_change_what_is_averaged(ranks, hook, least, most):
    difference = apart(ranks[0][f"muon {hook} parameters"], ranks[0]["muon parameters"])
    assert least < difference < most


def test_greedylore_that_sends_all_is_the_all_reduce(ranks):
    assert apart(ranks[0]["adamw whole parameters"], ranks[0]["adamw parameters"]) < 1e-6
    assert apart(ranks[0]["adamw greedylore parameters"], ranks[0]["adamw parameters"]) > 1e-2


@pytest.mark.parametrize("method", allreduce.METHODS)
def test_workers_agree(ranks, method):
    name = f"{method} parameters"
    np.testing.assert_array_equal(ranks[0][name], ranks[1][name])


def powersgd_entries(rank):
    return sum(rank * (m + n) if 2 * rank * (m + n) <= m * n else m * n for m, n in SHAPES)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("adamw", 4 * ENTRIES * STEPS),
        ("muon", 4 * ENTRIES * STEPS),
        ("muon float16", 2 * ENTRIES * STEPS),
        ("muon powersgd", 4 * (2 * ENTRIES + (STEPS - 2) * powersgd_entries(3))),
        *(
            # whole in the first and the fifth of six steps
            (f"{name} greedylore", 4 * (2 * ENTRIES + 4 * (24 + 3 * 32 + 16 + 3 * 32)))
            for name in ("muon", "adamw")
        ),
    ],
)
def test_the_bytes_are_those_of_the_collectives(ranks, method, expected):
    for rank in ranks:
        assert rank[f"{method} seen"] == expected
        assert list(rank[f"{method} counted"]) == [expected, expected, expected]


def test_an_all_reduce_needs_a_process_group():
    parameters = list(allreduce.new_model().parameters())
    for baseline in (AdamW, Muon):
        with pytest.raises(ValueError, match="launch with torchrun"):
            baseline(parameters)


def test_unknown_hooks_are_refused():
    parameters = list(allreduce.new_model().parameters())
    with pytest.raises(ValueError, match="hook='int4' is not allowed: choose float32"):
        AdamW(parameters, hook="int4")


def test_the_mean_gradient_is_what_is_clipped(ranks):
    for rank in ranks:
        norm, distance = rank["clipped"]
        assert norm == pytest.approx(0.1, rel=1e-4) and distance < 1e-5 * norm


def test_baselines_are_at_most_two_classes_below_torchs():
    for name in baselines.__all__:
        assert getattr(baselines, name).__mro__.index(torch.optim.Optimizer) <= 2


def descend(model, optimizer, steps):
    forward = optimizer.wrap(model)
    for step in steps:
        inputs, targets = allreduce.batch(0, step)
        (forward(inputs) - targets).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def start(baseline):
    """A model, and the baseline, which sends whole gradients in the first and the fourth step."""
    model = allreduce.new_model()
    groups = [{"name": "hidden", "params": list(model.parameters())}]
    return model, baseline(groups, lr=0.02, hook="greedylore", rank=3, refresh_every=3)


@pytest.mark.parametrize("baseline", [AdamW, Muon])
def test_a_state_resumes_exactly(baseline, process_group):
    first, second = start(baseline), start(baseline)
    descend(*first, range(2))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    assert second[1].round == first[1].round == 2
    expected = descend(*first, range(2, 6))
    assert all(map(torch.equal, descend(*second, range(2, 6)), expected))
    assert second[1].round == 6


@pytest.mark.parametrize("baseline", [AdamW, Muon])
def test_schedulers_act_on_the_optimizer_that_steps(baseline, process_group):
    for loaded in (False, True):
        model, optimizer = start(baseline)
        if loaded:
            optimizer.load_state_dict(optimizer.state_dict())
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        assert all(map(torch.equal, descend(model, optimizer, range(2)), before))


def test_any_optimizer_is_behind_ddp(process_group):
    model, other = allreduce.new_model(), allreduce.new_model()
    sgd = AllReduced(torch.optim.SGD(model.parameters(), lr=0.1))
    found = descend(model, sgd, range(3))
    reference = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in range(3):
        inputs, targets = allreduce.batch(0, step)
        (other(inputs) - targets).square().mean().backward()
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(found, list(other.parameters()))
    assert sgd.title == "AllReduced, all-reduce"


@pytest.mark.parametrize(("baseline", "named"), [(AdamW, "a parameter"), (Muon, "the gradient")])
def test_what_is_not_finite_is_reported(baseline, named, process_group):
    model, optimizer = start(baseline)
    optimizer.check_finite()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    with pytest.raises(FloatingPointError, match=named):
        optimizer.check_finite()
