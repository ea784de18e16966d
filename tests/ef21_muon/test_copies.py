"""Copies of an optimizer, as torch's own can be copied: with its model, and by themselves."""

import copy
import pickle

import pytest
import torch
from torch import nn

from baselines import DeMo, Dion
from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.compressors import RandK, RankK, TopK

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),  # what ours are to be like
    "ef21_muon": lambda p: EF21Muon(p, lr=0.02, w2s=RandK(0.3), s2w=TopK(0.2)),
    "local": lambda p: LocalSteps(
        torch.optim.AdamW(p), sync_every=3, w2s=RankK(0.3), outer_momentum=0.5
    ),
    "local, under way": lambda p: LocalSteps(
        EF21Muon(p, process_group=ALONE), sync_every=3, w2s=TopK(0.3), sync_delay=2
    ),
    "dion": lambda p: Dion([{"name": "hidden", "params": p}]),
    "demo": lambda p: DeMo([{"name": "hidden", "params": p}]),
}


def trained(make, steps=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = make(list(model.parameters()))
    take(model, optimizer, steps)
    return model, optimizer


def take(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def parameters_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copy_with_its_model_continues_alike_and_apart(name, duplicate):
    model, optimizer = trained(OPTIMIZERS[name])
    other_model, other_optimizer = duplicate((model, optimizer))
    before = parameters_of(model).clone()
    take(other_model, other_optimizer, 5)
    assert torch.equal(parameters_of(model), before)
    take(model, optimizer, 5)
    assert torch.equal(parameters_of(model), parameters_of(other_model))
    assert not torch.equal(parameters_of(model), before)
    state, its = str(optimizer.state_dict()), str(other_optimizer.state_dict())
    assert state == its


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copy_whose_step_a_scheduler_has_wrapped_steps_itself(name):
    model, optimizer = trained(OPTIMIZERS[name])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    other_model, other_optimizer = copy.deepcopy((model, optimizer))
    before = parameters_of(model).clone()
    take(other_model, other_optimizer, 1)
    assert torch.equal(parameters_of(model), before)
    assert not torch.equal(parameters_of(other_model), before)
    scheduler.step()
