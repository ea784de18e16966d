"""Gradients that a step cannot take: missing ones, sparse ones, and those of another shape."""

import pytest
import torch
from newer_torch import OTHER_TYPES
from torch import nn

from baselines import DeMo, Dion
from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import Quantize, TopK

METHODS = {
    "ef21_muon": lambda p, **options: EF21Muon(p, lr=0.1, w2s=TopK(0.5), **options),
    "corrected": lambda p, **options: EF21Muon(p, lr=0.1, momentum_kind="mvr", **options),
    "sign": lambda p, **options: EF21Muon(
        p, lr=0.1, lmo="workers", feedback="none", w2s=Quantize("sign@tensor"), **options
    ),
    "averaged": lambda p, **options: AveragedGradients(torch.optim.SGD(p, lr=0.1), **options),
    "local": lambda p, **options: LocalSteps(
        EF21Muon(p, lr=0.1, process_group=ALONE, **options), sync_every=2
    ),
}
BASELINES = {
    "dion": lambda p: Dion(p, lr=0.1),
    "demo": lambda p: DeMo(p, lr=0.1, k=4, chunk=4),
}
EVALUATING = ("mvr", "hessian")  # twice
CLOSURES = {"corrected": lambda: None}  # for steps on gradients that are there


def new_model(sparse=False):
    torch.manual_seed(0)
    table = nn.Embedding(8, 4, sparse=sparse)
    return nn.ModuleDict({"table": table, "one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})


def backward(model, branch="one", scale=lambda loss: loss):
    for parameter in model.parameters():
        parameter.grad = None
    loss = model[branch](model["table"](torch.arange(6))).square().mean()
    scale(loss).backward()
    return loss


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def without(model, *names):
    return [pair for pair in model.named_parameters() if not pair[0].startswith(names)]


@pytest.mark.parametrize("method", METHODS | BASELINES)
def test_a_missing_gradient_is_named_and_nothing_changes(method):
    model = new_model()
    optimizer = (METHODS | BASELINES)[method](model.named_parameters())
    before = values(model)
    backward(model)
    with pytest.raises(
        RuntimeError, match=r"^other\.weight has no gradient: every parameter given"
    ):
        optimizer.step(CLOSURES.get(method))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_gradient_is_zero_where_that_was_asked_for(method):
    """As if it were given; and training continues where the other branch is taken."""
    results = []
    for given in (True, False):
        model = new_model()
        optimizer = METHODS[method](model.named_parameters(), missing_grad="zero")
        for branch in ("one", "other", "one"):
            backward(model, branch)
            for parameter in model.parameters() if given else ():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step(CLOSURES.get(method))
        results.append(values(model))
    for name, found in results[1].items():
        assert torch.equal(found, results[0][name])


@pytest.mark.parametrize("kind", EVALUATING)
def test_both_gradients_of_a_batch_may_lack_a_parameters(kind):
    model = new_model()
    optimizer = EF21Muon(model.named_parameters(), momentum_kind=kind, missing_grad="zero")
    before = values(model)
    for branch in ("one", "one", "other"):
        optimizer.step(lambda branch=branch: backward(model, branch))
        moved = not torch.equal(model["other"].weight, before["other.weight"])
        assert moved == (branch == "other")


@pytest.mark.parametrize("method", [*METHODS, *EVALUATING])
def test_a_step_on_nothing_is_refused(method):
    """Whatever is asked for single ones."""
    model = new_model()
    closure = CLOSURES.get(method)
    if method in EVALUATING:
        optimizer = EF21Muon(model.named_parameters(), momentum_kind=method, missing_grad="zero")
        closure = model.zero_grad
    else:
        optimizer = METHODS[method](model.named_parameters(), missing_grad="zero")
    before = values(model)
    message = r"^none of the (parameters of \w+|inner optimizer's parameters) has a gradient"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message) as error:
            optimizer.step(closure)
        assert "\n" not in str(error.value)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_an_inner_optimizer_may_have_none_of_its_gradients():
    """As one of a branch that was not taken, beside others."""
    model = new_model()
    parts = [without(model, "other"), without(model, "table", "one")]
    inner = [EF21Muon(part, missing_grad="zero", process_group=ALONE) for part in parts]
    optimizer = LocalSteps(inner, sync_every=2)
    for _ in range(3):
        backward(model)
        optimizer.step()
    assert optimizer.round == 1


@pytest.mark.parametrize("missing", ["error", "zero"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", [method for method in METHODS if method not in CLOSURES])
def test_a_sparse_gradient_is_named(method, scaled, missing):
    model = new_model(sparse=True)
    named = without(model, "other")
    optimizer = METHODS[method](named, missing_grad=missing)
    before = values(model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    backward(model, scale=scaler.scale)
    with pytest.raises(RuntimeError, match=r"^the gradient of table\.weight is sparse \(torch"):
        scaler.step(optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_inner_optimizer_that_takes_sparse_gradients_gets_them(kind, scaled):
    results = []
    for sparse in (False, True):
        model = new_model(sparse)
        optimizer = LocalSteps(kind(without(model, "other"), lr=0.1), sync_every=2, w2s=TopK(0.5))
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
        for _ in range(4):
            backward(model, scale=scaler.scale)
            assert model["table"].weight.grad.is_sparse == sparse
            scaler.step(optimizer)
            scaler.update()
        results.append(values(model))
    for name, found in results[1].items():
        torch.testing.assert_close(found, results[0][name])


@pytest.mark.skipif(not OTHER_TYPES, reason="torch has no gradients of other types")
def test_gradients_in_float64_are_taken():
    model = new_model()
    for parameter in model.parameters():
        parameter.grad_dtype = None
    named = without(model, "other")
    optimizer = EF21Muon(named)
    backward(model)
    for _, parameter in named:
        parameter.grad = parameter.grad.double()
    optimizer.step()
    for _, parameter in named:
        parameter.grad = torch.ones(parameter.shape, dtype=torch.complex64)
    with pytest.raises(
        RuntimeError, match=r"^the gradient of table\.weight has shape \(8, 4\) and "
    ):
        optimizer.step()
