"""States of one process: what they are of is checked before anything changes."""

import copy

import pytest
import torch
from torch import nn

from baselines import DeMo, Dion, SignMuon
from ef21_muon import ALONE, EF21Muon, LocalSteps, RankK, Switch, TopK

MAKE = {
    "top 20%": lambda p: EF21Muon(p, w2s=TopK(0.2)),
    "top 30%": lambda p: EF21Muon(p, w2s=TopK(0.3)),
    "back": lambda p: EF21Muon(p, w2s=TopK(0.2), s2w=TopK(0.2)),
    "switch": lambda p: EF21Muon(p, w2s=Switch(TopK(0.2), RankK(0.3), start=5)),
    "ef14": lambda p: EF21Muon(p, w2s=TopK(0.2), feedback="ef14"),
    "local": lambda p: LocalSteps(EF21Muon(p, process_group=ALONE), every=3, w2s=TopK(0.2)),
    "dion": lambda p: Dion([{"name": "hidden", "params": p}]),
    "demo": lambda p: DeMo([{"name": "hidden", "params": p}]),
    "sign_muon": lambda p: SignMuon(p, feedback="ef21"),
}


def trained(name, steps=4):
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    optimizer = MAKE[name](list(model.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
    return optimizer


def tensors(optimizer):
    return [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_its_own_state_is_taken(name, full):
    optimizer, other = trained(name), trained(name, steps=1)
    state = optimizer.full_state_dict() if full else optimizer.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    assert other.steps == 4
    assert all(map(torch.equal, tensors(optimizer), tensors(other)))


@pytest.mark.parametrize("of", MAKE)
@pytest.mark.parametrize("name", MAKE)
def test_the_state_of_anything_else_is_refused_before_anything_changes(name, of):
    if name == of:
        return
    optimizer = trained(name, steps=1)
    before = tensors(optimizer)
    with pytest.raises(ValueError, match=r"^the state is of (method|feedback|compressors) "):
        optimizer.load_state_dict(trained(of).state_dict())
    assert optimizer.steps == 1 and all(map(torch.equal, before, tensors(optimizer)))


@pytest.mark.parametrize("name", MAKE)
def test_a_part_of_a_state_is_refused(name):
    optimizer = trained(name)
    state = optimizer.state_dict()
    part = {key: state[key] for key in ("state", "param_groups")}
    with pytest.raises(ValueError, match=r"^the state lacks what it is of, its counters and its"):
        optimizer.load_state_dict(part)
