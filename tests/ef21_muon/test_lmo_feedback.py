"""Error feedback of the LMO's step against float64, and where it is refused."""

import numpy as np
import pytest
import reference
import torch
from torch.nn import Parameter

from ef21_muon import EF21Muon
from ef21_muon.compressors import TopK
from ef21_muon.norms import AdaptiveRadius, Euclidean, Sign, Spectral

ROUNDS, SHAPE, LR, RADIUS, BETA, DECAY = 15, (6, 9), 0.05, 3.0, 0.3, 0.2
LMOS = {
    "spectral": (Spectral(), reference.spectral_lmo),
    "sign": (Sign(), reference.sign_lmo),
    "euclidean": (Euclidean(), lambda g: -g / np.linalg.norm(g)),
}


def gradient(model, step):
    noise = np.random.default_rng([5, step]).normal(size=SHAPE)
    return 2 * model * np.linspace(0.1, 1, SHAPE[1]) + noise


def transcription(lmo, compress, decay):
    """W and what is left out, after every round: e + eta M, of which the part along its LMO goes.

    With P = e + eta M and Z its LMO: W <- W + (<P, -Z> / ||Z||^2) Z and e <- P less that step.
    """
    model, error = np.zeros(SHAPE), np.zeros(SHAPE)
    momentum, estimate, found = None, np.zeros(SHAPE), []
    for k in range(ROUNDS):
        g = gradient(model, k)
        momentum = g if momentum is None else (1 - BETA) * momentum + BETA * g
        estimate = estimate + compress(momentum - estimate, None)
        wanted = error + LR * RADIUS * estimate
        z = lmo(wanted)
        step = np.sum(wanted * -z) / np.sum(z * z) * z
        model, error = model + step - LR * decay * model, wanted + step
        found.append((model, error))
    return found


def build(**options):
    parameter = Parameter(torch.zeros(SHAPE))
    given = {"lr": LR, "radius": RADIUS, "momentum": 1 - BETA, "lmo_feedback": True} | options
    return parameter, EF21Muon([parameter], **given)


def step(parameter, optimizer, k):
    model = parameter.detach().double().numpy()
    parameter.grad = torch.from_numpy(gradient(model, k)).float()
    optimizer.step()


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("sent", ["all", "a third"])
@pytest.mark.parametrize("name", LMOS)
def test_steps_are_those_of_the_definition(name, sent, decay):
    norm, lmo = LMOS[name]
    fraction = {"all": 1.0, "a third": 1 / 3}[sent]
    w2s = "identity" if sent == "all" else TopK(fraction)
    parameter, optimizer = build(norm=norm, w2s=w2s, weight_decay=decay)
    compress = reference.top_k(fraction, reference.float32)
    for k, (model, error) in enumerate(transcription(lmo, compress, decay)):
        step(parameter, optimizer, k)
        left = optimizer.state[parameter]["server_lmo_error"]
        scale = np.abs(model).max()
        np.testing.assert_allclose(parameter.detach().numpy(), model, atol=1e-4 * scale)
        np.testing.assert_allclose(left.numpy(), error, atol=1e-4 * scale)


def test_with_what_is_left_out_it_is_gradient_descent():
    """X - e = X^0 - sum of lr radius M, whatever the LMO: what undoes Muon's equal steps."""
    parameter, optimizer = build()
    descended = torch.zeros(SHAPE)
    for k in range(ROUNDS):
        step(parameter, optimizer, k)
        state = optimizer.state[parameter]
        descended -= LR * RADIUS * state["momentum"]
        left = state["server_lmo_error"]
        assert left.norm() > 0.05 * parameter.norm()
        torch.testing.assert_close(parameter.detach() - left, descended, rtol=0, atol=1e-5)


def test_where_nothing_is_wanted_nothing_moves():
    parameter, optimizer = build()
    for _ in range(2):
        parameter.grad = torch.zeros(SHAPE)
        optimizer.step()
    assert not parameter.any()


def test_it_resumes_bit_for_bit_from_its_state():
    parameter, optimizer = build()
    for k in range(3):
        step(parameter, optimizer, k)
    other, again = build()
    other.data.copy_(parameter)
    again.load_state_dict(optimizer.state_dict())
    for one in ((parameter, optimizer), (other, again)):
        step(*one, 3)
    assert torch.equal(parameter, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmo_feedback": 1}, "lmo_feedback=1 is not allowed: give True or False"),
        ({"radius": AdaptiveRadius(1, 0)}, "radius=.* with lmo_feedback=True, .*give a number$"),
    ],
)
def test_what_it_does_not_go_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
