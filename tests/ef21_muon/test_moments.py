"""A training that is evaluated, saved, loaded or rolled back at any moment is the same one."""

import copy
import io
import json
import pickle

import pytest
import torch
from run import torchrun
from torch import nn
from workers.moments import MOMENTS as MOMENTS_OF_TWO

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import Quantize, TopK

INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "lossy back": lambda p: EF21Muon(p, process_group=ALONE, w2s=TopK(0.5), s2w=TopK(0.3)),
    "lossless": lambda p: EF21Muon(p, process_group=ALONE),
}
OPTIONS = {
    "plain": {"sync_every": 3},
    "compressed": {"sync_every": 3, "w2s": TopK(0.3), "outer_momentum": 0.5},
    "sync_delay": {"sync_every": 4, "w2s": TopK(0.3), "sync_delay": 1, "s2w": Quantize("normal3")},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moments")
    torchrun("moments.py", directory, ranks=2)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("server", "steps"), MOMENTS_OF_TWO)
def test_a_state_brings_two_ranks_back_whatever_is_under_way(reports, server, steps):
    assert all(report["back"][f"{server} {steps}"] for report in reports)


def test_ranks_that_load_other_models_before_the_first_step_do_not_agree(reports):
    for report in reports:
        assert "differs between rank 0 and rank 1" in report["loaded"]


def build(inner, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, LocalSteps(INNER[inner](list(model.parameters())), **OPTIONS[options])


def take(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).sub(inputs[:, :4].sin()).square().mean().backward()
        optimizer.step()


def resumed(model, optimizer, inner, options):
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    others, other = build(inner, options)
    others.load_state_dict(weights)
    other.load_state_dict(state)
    return others, other


def evaluated(model, optimizer, inner, options):
    for _ in range(2):
        with optimizer.global_params():
            model(torch.ones(1, 6))
    return model, optimizer


MOMENTS = {
    "evaluated": evaluated,
    "resumed": resumed,
    "copied": lambda model, optimizer, *_: copy.deepcopy((model, optimizer)),
    "pickled": lambda model, optimizer, *_: pickle.loads(pickle.dumps((model, optimizer))),
}


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        *(("sgd", "plain"), ("sgd", "compressed")),
        *(("lossy back", "sync_delay"), ("lossless", "plain")),
    ],
)
def test_no_moment_changes_the_training(inner, options):
    """Before each of the first steps, which are more than a round with all its delays."""
    trainings = {None: build(inner, options)} | {name: build(inner, options) for name in MOMENTS}
    for step in range(9):
        for name, training in trainings.items():
            if name and step < 6:
                trainings[name] = training = MOMENTS[name](*training, inner, options)
            take(*training, 1, first=step)
        expected = [*trainings[None][0].parameters()]
        for name, (model, _) in trainings.items():
            assert all(map(torch.equal, expected, model.parameters())), (name, step)


@pytest.mark.parametrize("options", ["plain", "compressed"])
@pytest.mark.parametrize("inner", INNER)
def test_a_model_that_is_loaded_before_the_first_step_is_w(inner, options):
    model, optimizer = build(inner, options)
    loaded = {name: torch.randn_like(one) for name, one in model.state_dict().items()}
    model.load_state_dict(loaded)
    with optimizer.global_params():
        assert all(torch.equal(one, loaded[name]) for name, one in model.state_dict().items())
    expected, its_optimizer = build(inner, options)
    expected.load_state_dict(loaded)
    its_optimizer = LocalSteps(INNER[inner](list(expected.parameters())), **OPTIONS[options])
    take(model, optimizer, 7)
    take(expected, its_optimizer, 7)
    assert all(map(torch.equal, expected.parameters(), model.parameters()))


WRAPPED = {
    "local": lambda inner: LocalSteps(inner, sync_every=2, w2s=TopK(0.5)),
    "averaged": lambda inner: AveragedGradients(inner, w2s=TopK(0.5)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_an_inner_optimizer_that_loads_a_state_stays_the_one_that_schedulers_act_on(name):
    model = nn.Linear(6, 4)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = WRAPPED[name](inner)
    inner.load_state_dict(inner.state_dict())
    take(nn.Sequential(model), optimizer, 1)
    assert optimizer.param_groups[0] is inner.param_groups[0]


@pytest.mark.parametrize("change", ["add", "clear"])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_group_that_comes_or_goes_later_is_refused(name, change):
    model = nn.Linear(6, 4)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = WRAPPED[name](inner)
    if change == "add":
        inner.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    else:
        inner.param_groups.clear()
    with pytest.raises(RuntimeError, match=r"there are [02] parameter groups where there were 1 "):
        take(nn.Sequential(model), optimizer, 1)


@pytest.mark.parametrize("name", WRAPPED)
def test_schedulers_of_a_momentum_know_it(name):
    model = nn.Linear(6, 4)
    optimizer = WRAPPED[name](torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    seen = set()
    for _ in range(5):
        take(nn.Sequential(model), optimizer, 1)
        scheduler.step()
        seen.add(optimizer.inner[0].param_groups[0]["momentum"])
    assert len(seen) == 5


def test_a_missing_gradient_is_refused_before_another_inner_optimizer_steps():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    first = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    second = EF21Muon(model[1].parameters(), process_group=ALONE)
    optimizer = LocalSteps([first, second], sync_every=2)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 6)).sum().backward()
    model[1].weight.grad = None
    with pytest.raises(RuntimeError, match="parameter 0 of group 1 has no gradient"):
        optimizer.step()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_what_finish_has_brought_does_not_arrive_again():
    """Where a training continues after it, by steps that change nothing."""
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = LocalSteps(torch.optim.SGD([parameter], lr=1.0), 3, sync_delay=1, outer_lr=0.5)
    found = []
    for gradient in (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0):
        parameter.grad = torch.full((4, 4), gradient)
        optimizer.step()
        if optimizer.steps == 3:
            optimizer.final_sync()
        with optimizer.global_params():
            found.append(parameter[0, 0].item())
    assert found == [0, 0, -1.5, -1.5, -1.5, -1.5, -1.5]


def test_a_round_that_an_error_has_interrupted_is_taken_with_the_next_step():
    model, optimizer = build("sgd", "plain")
    take(model, optimizer, 2)
    decode, error = optimizer.batches[0].down.decode, RuntimeError("the link is gone")

    def fail(message):
        raise error

    optimizer.batches[0].down.decode = fail
    with pytest.raises(RuntimeError, match="the link is gone"):
        take(model, optimizer, 1, first=2)
    assert (optimizer.steps, optimizer.round) == (2, 0)
    optimizer.batches[0].down.decode = decode
    take(model, optimizer, 1, first=2)
    assert (optimizer.steps, optimizer.round) == (3, 1)
    with optimizer.global_params():
        w = [parameter.clone() for parameter in model.parameters()]
    for parameter, shared in zip(model.parameters(), w, strict=True):
        assert torch.equal(parameter, shared)
