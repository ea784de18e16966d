"""Corrected momentum against its formulas in float64, and where it is refused."""

import numpy as np
import pytest
import reference
import torch
from torch.nn import Parameter

from ef21_muon import ALONE, EF21Muon, LocalSteps, WorkerMesh
from ef21_muon.compressors import Identity, TopK
from ef21_muon.correction import PARTS
from ef21_muon.norms import Euclidean

ROUNDS, SHAPE, LR, BETA = 20, (6, 9), 0.1, 0.3
KINDS = ("mvr", "hessian")
STEP = PARTS["hessian"]


def batch(step):
    """A, B of a round's loss, ||W A - B||^2 / 2 + sum(W^3) / 3."""
    generator = np.random.default_rng([3, step])
    return generator.normal(size=(SHAPE[1], 7)), generator.normal(size=(SHAPE[0], 7))


def gradient(model, step):
    inputs, targets = batch(step)
    return (model @ inputs - targets) @ inputs.T + model**2


def lmo(g):
    """Of the Euclidean norm, so that no two entries of a step are of one size."""
    return -g / np.linalg.norm(g)


def transcription(kind, gamma, back):
    """W after every round of EF21 with TopK and this momentum; how often a gradient was taken."""
    model = np.zeros(SHAPE)
    iterate, estimate, before = model, np.zeros(SHAPE), None
    top = reference.top_k(0.3, reference.float32)
    models, taken = [], 0
    for k in range(ROUNDS):
        g = gradient(model, k)
        taken += 1
        if k == 0:
            momentum = g
        else:
            if kind == "mvr":
                d = g - gradient(before, k)
            else:
                place = model - STEP * (model - before)
                d = (g - gradient(place, k)) / STEP
            taken += 1
            momentum = (1 - BETA) * (momentum + gamma * d) + BETA * g
        before = model
        estimate = estimate + top(momentum - estimate, None)
        iterate = iterate + LR * lmo(estimate)
        model = model + (top(iterate - model, None) if back else iterate - model)
        models.append(model)
    return np.stack(models), taken


def ours(kind, gamma, back, **options):
    """The same by EF21Muon."""
    parameter = Parameter(torch.zeros(SHAPE))
    s2w = TopK(0.3) if back else Identity()
    optimizer = EF21Muon(
        [parameter], lr=LR, momentum=1 - BETA, norm=Euclidean(), w2s=TopK(0.3), s2w=s2w,
        momentum_kind=kind, gamma=gamma, **options,
    )  # fmt: skip
    models, calls = [], 0
    for k in range(ROUNDS):
        inputs, targets = (torch.from_numpy(x).float() for x in batch(k))

        def closure(inputs=inputs, targets=targets):
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = (parameter @ inputs - targets).square().sum() / 2 + (parameter**3).sum() / 3
            loss.backward()
            return loss

        optimizer.step(closure)
        models.append(parameter.detach().double().numpy().copy())
    return np.stack(models), calls, optimizer


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("kind, gamma", [("mvr", 1.0), ("mvr", 0.1), ("hessian", 1.0)])
def test_rounds_agree_with_the_formulas(kind, gamma, back):
    """Also where servers send back differences: W is elsewhere for a moment, X is not."""
    found, calls, _ = ours(kind, gamma, back)
    expected, taken = transcription(kind, gamma, back)
    for k in range(ROUNDS):
        scale = np.linalg.norm(expected[k])
        assert np.linalg.norm(found[k] - expected[k]) < 1e-4 * scale, k
    assert calls == taken


def test_without_weight_it_is_polyaks_momentum():
    plain, _, _ = ours("polyak", 1.0, False)
    for kind in KINDS:
        np.testing.assert_array_equal(ours(kind, 0.0, False)[0], plain)
    assert np.abs(ours("mvr", 1.0, False)[0] - plain).max() > 1e-3


def test_the_differenced_hessian_is_nearly_the_exact_one():
    """Along the way of the last step, of a loss whose Hessian changes."""
    torch.manual_seed(0)
    model = Parameter(torch.randn(SHAPE))
    before = model.detach() + 0.02 * torch.randn(SHAPE)
    inputs, targets = (torch.from_numpy(x).float() for x in batch(0))

    def loss(w):
        return (w @ inputs - targets).square().sum() / 2 + (w**3).sum() / 3

    way = model.detach() - before
    (exact,) = torch.autograd.functional.hvp(loss, (model.detach(),), (way,))[1]
    place = model.detach() - STEP * way
    g, other = (torch.autograd.functional.jacobian(loss, x) for x in (model.detach(), place))
    found = (g - other) / STEP
    assert torch.linalg.norm(found - exact) < 0.01 * torch.linalg.norm(exact)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_a_closure_is_refused(kind):
    parameter = Parameter(torch.ones(SHAPE))
    optimizer = EF21Muon([parameter], momentum_kind=kind)
    parameter.grad = torch.ones(SHAPE)
    with pytest.raises(RuntimeError, match=r"every batch twice: call step\(closure\) with"):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(SHAPE))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_before_is_kept(kind):
    models, _, optimizer = ours(kind, 1.0, False)
    (state,) = optimizer.state.values()
    assert set(state) == {"momentum", "gradient_estimate", "server_gradient", "previous_model"}
    np.testing.assert_array_equal(state["previous_model"].double().numpy(), models[-2])


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda p: EF21Muon([p], momentum_kind="nag"),
            "momentum_kind='nag' is not allowed: choose polyak, ",
        ),
        (
            lambda p: EF21Muon([p], momentum_kind="mvr1"),
            "momentum_kind='mvr1' is not allowed: choose polyak, ",
        ),
        (lambda p: EF21Muon([p], gamma=-1.0), "gamma=-1.0 is not allowed: give a number of at le"),
        (
            lambda p: LocalSteps(EF21Muon([p], momentum_kind="mvr", process_group=ALONE)),
            "inner=EF21Muon with momentum_kind='mvr' needs a closure in every step: give momen",
        ),
        (
            lambda p: EF21Muon([p], momentum_kind="hessian", mesh=WorkerMesh([p], 1)),
            "momentum_kind='hessian' is not allowed with workers of several ranks, ",
        ),
    ],
)
def test_what_cannot_be_corrected_is_refused(process_group, build, message):
    with pytest.raises(ValueError) as error:
        build(Parameter(torch.ones(SHAPE)))
    assert str(error.value).startswith(message)
