"""What the optimizer holds and what the user sees are one: taken over, or refused in one line."""

import copy

import pytest
import torch
from torch import nn

from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.compressors import Quantize, TopK
from ef21_muon.norms import Sign, Spectral

MAKE = {
    "ef21_muon": lambda model, **options: EF21Muon(
        [
            {"params": list(model[:2].parameters()), "norm": Spectral(dtype=torch.float32)},
            {"params": list(model[2:].parameters()), "norm": Sign()},
        ],
        **{"lr": 0.02, "w2s": TopK(0.5)} | options,
    ),
    "local": lambda model, **options: LocalSteps(
        EF21Muon(model.parameters(), lr=0.02, process_group=ALONE), sync_every=2, w2s=TopK(0.5)
    ),
}


def new_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def take(model, optimizer, steps=1, first=0):
    for step in range(first, first + steps):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def parameters_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def load(model, other):
    model.load_state_dict(other.state_dict())


def assign(model, other):
    for parameter, its in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = its.detach().clone()


def copy_in_place(model, other):
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize(
    ("change", "steps", "s2w"),
    [
        *((load, 0, TopK(0.2)), (load, 3, "identity"), (load, 3, TopK(0.2))),
        *((assign, 0, Quantize("int4")), (assign, 3, TopK(0.2))),
        *((copy_in_place, 0, "identity"), (copy_in_place, 3, Quantize("int4"))),
    ],
)
def test_a_model_that_was_loaded_stays_where_it_is(change, steps, s2w):
    model, other = new_model(), new_model(seed=1)
    optimizer = MAKE["ef21_muon"](model, s2w=s2w)
    take(model, optimizer, steps)
    change(model, other)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take(model, optimizer, 6, first=steps)
    assert torch.equal(parameters_of(model), parameters_of(other))


@pytest.mark.parametrize("model_first", [True, False])
def test_a_state_and_its_model_are_loaded_in_either_order(model_first):
    model = new_model()
    optimizer = MAKE["ef21_muon"](model, s2w=TopK(0.2))
    take(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = new_model(seed=1)
    other_optimizer = MAKE["ef21_muon"](other, s2w=TopK(0.2))
    loads = [
        lambda: other.load_state_dict(saved[0]),
        lambda: other_optimizer.load_state_dict(saved[1]),
    ]
    for one in loads if model_first else loads[::-1]:
        one()
    take(model, optimizer, 3, first=3)
    take(other, other_optimizer, 3, first=3)
    assert torch.equal(parameters_of(model), parameters_of(other))


def replace_parameter(model, optimizer):
    model[0].weight = nn.Parameter(torch.zeros(8, 6))
    optimizer.param_groups[0]["params"][0] = model[0].weight


def drop_parameter(model, optimizer):
    optimizer.param_groups[0]["params"].pop()


@pytest.mark.parametrize("change", [replace_parameter, drop_parameter])
@pytest.mark.parametrize("method", MAKE)
def test_a_parameter_that_was_replaced_is_reported(method, change):
    model = new_model()
    optimizer = MAKE[method](model)
    take(model, optimizer)
    change(model, optimizer)
    with pytest.raises(RuntimeError, match="the parameters of group 0 are others than when"):
        take(model, optimizer)


@pytest.mark.parametrize("name", ["w2s", "s2w"])
def test_a_compressor_that_was_replaced_is_reported(name):
    model = new_model()
    optimizer = MAKE["ef21_muon"](model, server="sharded")
    take(model, optimizer)
    optimizer.param_groups[1][name] = TopK(0.01)
    with pytest.raises(RuntimeError, match=f"{name}=top 1% was put into group 1 after"):
        take(model, optimizer)


@pytest.mark.parametrize(
    "entry", [{"lr": 0.5}, {"radius": 3.0}, {"momentum": 0}, {"norm": Sign()}, {"nesterov": True}]
)
def test_other_entries_of_a_group_take_effect(entry):
    models = [new_model(), new_model()]
    optimizers = [MAKE["ef21_muon"](model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        take(model, optimizer)
    optimizers[0].param_groups[0].update(entry)
    for model, optimizer in zip(models, optimizers, strict=True):
        take(model, optimizer, 2, first=1)
    assert not torch.equal(*map(parameters_of, models))
