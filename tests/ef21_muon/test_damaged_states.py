"""States that were cut, changed, or never were one: nothing changes before they are refused."""

import pytest
import torch
from one_layer import everything, layer, take_steps

from ef21_muon import LocalSteps
from ef21_muon.compressors import TopK


def without(state, *path):
    for key in path[:-1]:
        state = state[key]
    del state[path[-1]]


DAMAGE = {
    "a generator": lambda s: without(s, "generators", "w2s"),
    "random numbers of another device": lambda s: s["generators"].update(w2s=torch.zeros(16)),
    "no random numbers": lambda s: s["generators"].update(w2s=None),
    "steps": lambda s: s.update(steps="7"),
    "steps below zero": lambda s: s.update(steps=-5),
    "traffic": lambda s: s.update(traffic=None),
    "a parameter": lambda s: without(s, "state", 0),
    "a shape": lambda s: s["state"][0].update(dict.fromkeys(s["state"][0], torch.zeros(2, 2))),
    "a group": lambda s: s["param_groups"].clear(),
    "what it is of": lambda s: s.update(of=None),
    "the inner state": lambda s: s.update(inner=None),
    "an inner optimizer": lambda s: s["inner"].clear(),
    "inner groups": lambda s: s["inner"][0]["param_groups"].clear(),
    "an entry of the inner state": lambda s: without(s, "inner", 0, "state", 0, "exp_avg"),
    "an inner shape": lambda s: s["inner"][0]["state"][0].update(exp_avg=torch.zeros(2)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_refused_before_anything_changes(what):
    model = layer()
    optimizer = LocalSteps(torch.optim.AdamW(model.parameters()), sync_every=3, w2s=TopK(0.3))
    take_steps(model, optimizer, 4)
    state = optimizer.state_dict()
    take_steps(model, optimizer, 2, first=4)
    DAMAGE[what](state)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"^the state ") as refusal:
        optimizer.load_state_dict(state)
    assert "\n" not in str(refusal.value)
    assert everything(optimizer) == before and optimizer.steps == 6


@pytest.mark.parametrize("state", ["a text", 5, [], {"ranks": []}, {"ranks": [None]}, {}])
def test_what_is_no_state_is_refused(state):
    optimizer = LocalSteps(torch.optim.AdamW(layer().parameters()))
    with pytest.raises(ValueError, match=r"^the state "):
        optimizer.load_state_dict(state)
