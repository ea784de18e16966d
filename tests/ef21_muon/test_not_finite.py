"""What one worker sends that is not finite: W stays finite, and rank and layer are named.

On two ranks; see tests/support/workers/not_finite.py.
"""

import copy
import json
from math import inf, isfinite, nan

import pytest
import torch
from run import torchrun
from torch import nn
from workers.not_finite import BROKEN, CASES, LAYER, SHAPES, STEPS

from ef21_muon import EF21Muon, LocalSteps
from ef21_muon.compressors import TopK


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("not_finite")
    torchrun("not_finite.py", directory, ranks=2)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_w_stays_finite_and_the_same_on_all(reports, name):
    first, second = (report[f"{name} 1"]["models"] for report in reports)
    assert first == second
    assert all(isfinite(x) for model in first for layer in model.values() for x in layer)


@pytest.mark.parametrize("name", CASES)
def test_the_layer_stands_still_and_others_continue(reports, name):
    """As if nothing had happened, bit for bit where nothing random is sent."""
    found, without = (reports[0][f"{name} {faulty}"]["models"] for faulty in (1, 0))
    before = BROKEN - 1
    assert found[:before] == without[:before]
    # The inner optimizer of gradients continues by its own momentum, W moves to X if s2w is lossy,
    # a Muon inside of local steps has left the gradient out itself, and DeMo steps by signs.
    if not name.startswith("averaged") and name not in ("rank0", "local, muon", "demo"):
        assert found[before][LAYER] == found[before - 1][LAYER]
    for layer in SHAPES.keys() - {LAYER}:
        assert found[-1][layer] != found[0][layer] or name.startswith("local")
        if name in ("identity", "rank0", "one entry", "ef14", "averaged", "local, plain"):
            assert [model[layer] for model in found] == [model[layer] for model in without]


@pytest.mark.parametrize("name", CASES)
def test_the_one_who_sent_it_is_named(reports, name):
    said = reports[1][f"{name} 1"]["finite"]
    if name == "overflowing":
        assert said.startswith(f"this worker's message of {LAYER} was not finite at step {BROKEN}")
    elif name.startswith("local") and name != "local, muon":
        assert said.startswith(f"{LAYER} is not finite after step ")
    else:
        assert said.startswith(f"the gradient of {LAYER} was not finite at step {BROKEN}: lower")
    assert reports[0][f"{name} 1"]["finite"] == ""
    for report in reports:
        assert report[f"{name} 1"]["agreement"] == f"rank 1: {said}"
        assert report[f"{name} 0"]["finite"] == report[f"{name} 0"]["agreement"] == ""


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_w_of_a_worker_alone_stays_finite_too(value):
    for make in (
        lambda p: EF21Muon(p, lr=0.1),
        lambda p: LocalSteps(torch.optim.SGD(p, lr=0.1), sync_every=1),
        lambda p: LocalSteps(torch.optim.SGD(p, lr=0.1), sync_every=2, sync_delay=1),
    ):
        model = nn.Linear(3, 3)
        optimizer = make(model.parameters())
        for step in range(STEPS):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            if step == BROKEN:
                model.weight.grad[0, 1] = value
            optimizer.step()
        for check in (optimizer.check_finite, optimizer.check_agreement):
            with pytest.raises(
                FloatingPointError, match=r"^(the gradient of )?parameter 0 of group"
            ):
                check()
        if isinstance(optimizer, LocalSteps):
            with optimizer.global_params():
                assert model.weight.isfinite().all()
        else:
            assert model.weight.isfinite().all()


@pytest.mark.parametrize("local", [False, True])
def test_a_training_resumes_from_a_state_before(local):
    def build():
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        if local:
            return model, LocalSteps(torch.optim.AdamW(model.parameters()), sync_every=2)
        return model, EF21Muon(model.parameters(), w2s=TopK(0.5))

    def take(model, optimizer, value):
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, value)
            optimizer.step()

    model, optimizer = build()
    take(model, optimizer, 1.0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    take(model, optimizer, nan)
    with pytest.raises(FloatingPointError):
        optimizer.check_finite()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    take(model, optimizer, 1.0)
    optimizer.check_finite()
    optimizer.check_agreement()
    expected, other = build()
    take(expected, other, 1.0)
    take(expected, other, 1.0)
    assert torch.equal(model.weight, expected.weight)


@pytest.mark.parametrize("local", [False, True])
def test_who_does_not_ask_is_warned_once_some_steps_later(local, caplog):
    model = nn.Linear(3, 3)
    if local:
        optimizer = LocalSteps(torch.optim.SGD(model.parameters(), 0.1), sync_every=1)
    else:
        optimizer = EF21Muon(model.parameters())
    said = []
    for value in (1.0, nan, 1.0, 1.0, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
        said.append(len(caplog.messages))
    assert said == [0, 0, 0, 1, 1]
    (line,) = caplog.messages
    assert (
        line.startswith("rank 0: ")
        and "parameter 0 of group 0" in line
        and " step 2: lower" in line
    )
    assert copy.deepcopy(optimizer).steps == 5
