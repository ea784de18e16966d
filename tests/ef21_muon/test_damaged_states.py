"""States that were cut, changed, or never were one: nothing changes before they are refused."""

import pytest
import torch
from one_layer import everything, layer, rest, take_steps

from ef21_muon import LocalSteps
from ef21_muon.compressors import TopK


def without(state, *path):
    for key in path[:-1]:
        state = state[key]
    del state[path[-1]]


def update(state, *path, **values):
    for key in path:
        state = state[key]
    state.update(values)


def table(state):
    return next(iter(state["state"][1].values()))


DAMAGE = {
    "a generator": lambda s: without(rest(s), "generators", "w2s"),
    "random numbers of another device": lambda s: update(
        rest(s), "generators", w2s=torch.zeros(16)
    ),
    "no random numbers": lambda s: update(rest(s), "generators", w2s=None),
    "steps": lambda s: rest(s).update(counters=rest(s)["counters"].double()),
    "steps below zero": lambda s: rest(s)["counters"].neg_(),
    "traffic": lambda s: rest(s).update(counters=rest(s)["counters"][:3]),
    "a count without a denominator": lambda s: rest(s)["counters"][1:].zero_(),
    "no counters": lambda s: rest(s).update(counters=None),
    "a parameter": lambda s: without(s, "state", 1),
    "a shape": lambda s: table(s).update(rank0=torch.zeros(2, 2)),
    "a table as others have it": lambda s: s["state"][1].update(error=torch.zeros(8, 1)),
    "a table of another rank": lambda s: table(s).update(rank1=table(s).pop("rank0")),
    "a group": lambda s: s["param_groups"].clear(),
    "what it is of": lambda s: rest(s).update(of=None),
    "no text": lambda s: rest(s)["of"].fill_(200),
    "no JSON": lambda s: rest(s)["of"].fill_(70),
    "the inner state": lambda s: rest(s).update(inner=None),
    "an inner optimizer": lambda s: rest(s)["inner"].clear(),
    "all of the inner state": lambda s: rest(s)["inner"]["0"]["state"].clear(),
    "an entry of the inner state": lambda s: without(
        rest(s), "inner", "0", "state", "0", "exp_avg"
    ),
    "an inner shape": lambda s: update(rest(s), "inner", "0", "state", "0", exp_avg=torch.zeros(2)),
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
