"""The problems' constants, which the theorems need."""

from functools import cache
from math import pi, sqrt

import numpy as np
import pytest
import torch
from functions import matrices, problem
from hypothesis import given
from hypothesis import strategies as st
from sympy import fresnels

from scripts.theory.problems import Quadratic, Rippled, geometry
from scripts.theory.studies import GEOMETRIES


def norm_of(place, x):
    return np.linalg.norm(x, 2) if place == "spectral" else np.abs(x).max()


def dual_of(place, x):
    return np.linalg.norm(x, "nuc") if place == "spectral" else np.abs(x).sum()


scales = st.floats(-2, 1).map(lambda exponent: 10**exponent)


@given(matrices)
@pytest.mark.parametrize("place", GEOMETRIES)
def test_geometries(place, pair):
    """The norms by NumPy, their constants, and their LMO."""
    x, g = pair
    at = geometry(place, 3, 4)
    norm, euclidean = norm_of(place, x), np.linalg.norm(x)
    assert at.rho * norm <= euclidean * (1 + 1e-12) <= at.rho_bar * norm * (1 + 1e-9)
    assert at.norm.dual(torch.from_numpy(g)) == pytest.approx(dual_of(place, g))
    step = at.norm.lmo(torch.from_numpy(g)).numpy()
    assert norm_of(place, step) == pytest.approx(1)
    assert -(g * step).sum() == pytest.approx(dual_of(place, g))
    assert dual_of(place, x * g) <= at.stretch * dual_of(place, g) * norm * (1 + 1e-9)
    assert dual_of(place, x) <= at.scale * norm * (1 + 1e-9)


@cache
def theorem(kind, place):
    return problem(kind).theorem(geometry(place, 3, 4))


@given(matrices)
@pytest.mark.parametrize("place", GEOMETRIES)
def test_constants_of_quadratics(place, pair):
    quadratic, at, t = problem(Quadratic), geometry(place, 3, 4), theorem(Quadratic, place)
    x, y = torch.from_numpy(pair)
    changes = (quadratic.gradients(x) - quadratic.gradients(y)).numpy()
    distance = norm_of(place, pair[0] - pair[1])
    smoothness = quadratic.weights.numpy() * at.scale
    for change, L in zip(changes, smoothness, strict=True):
        assert dual_of(place, change) <= L * distance * (1 + 1e-9)
    assert dual_of(place, changes.mean(0)) <= t.L * distance * (1 + 1e-9)
    assert t.L_bar == pytest.approx(sqrt(np.mean(smoothness**2)))
    extreme = -at.norm.lmo(x)  # where L is attained
    change = quadratic.gradients(x + extreme) - quadratic.gradients(x)
    assert dual_of(place, change.mean(0).numpy()) == pytest.approx(t.L)

    def f(z):
        return np.mean(
            [
                a / 2 * np.sum((z - b) ** 2)
                for a, b in zip(quadratic.weights.numpy(), quadratic.targets.numpy(), strict=True)
            ]
        )

    assert t.delta0 == pytest.approx(f(0) - f(quadratic.centre.numpy()))
    assert quadratic.gradients(quadratic.centre).mean(0).abs().max() < 1e-12


@given(matrices, scales, scales)
@pytest.mark.parametrize("place", GEOMETRIES)
def test_constants_of_rippled_functions(place, pair, size, distance):
    """A4 of f and of the f_j, at points near and far."""
    rippled, at, t = problem(Rippled), geometry(place, 3, 4), theorem(Rippled, place)
    x = 10 * size * pair[0]
    y = x + distance * pair[1]
    old, new = (rippled.gradients(torch.from_numpy(z)).numpy() for z in (x, y))
    step = norm_of(place, y - x)
    for a, g, h in zip(rippled.weights.numpy(), old, new, strict=True):
        allowed = (1.75 * a * at.scale + at.stretch * dual_of(place, g)) * step
        assert dual_of(place, h - g) <= allowed
    g, h = old.mean(0), new.mean(0)
    assert dual_of(place, h - g) <= (t.L0 + t.L1 * dual_of(place, g)) * step
    assert t.L0_bar == pytest.approx(1.75 * float(rippled.weights.mean()) * at.scale)
    assert t.L1 == t.L1_max == at.stretch


def test_smoothness_of_rippled_functions_near_their_centre():
    """There the gradient is small, and distant targets make most of L^0: it is nearly needed."""
    rippled = Rippled(torch.ones(2).double(), torch.tensor([-4.0, 6.0]).double().view(2, 1, 1))
    t = rippled.theorem(geometry("max", 1, 1))
    points = torch.linspace(0.5, 1.5, 2001, dtype=torch.float64)[:, None, None]
    derivatives = rippled.gradients(points).mean(0).flatten()
    curvatures = derivatives.diff().abs() / 5e-4
    needed = (curvatures - t.L1 * derivatives[1:].abs()).max()
    assert 0.6 * t.L0 < needed <= t.L0


def test_rippled_functions_are_neither_smooth_nor_convex():
    rippled = Rippled(torch.ones(1).double(), torch.zeros(1, 1, 1).double())
    for curvature in (-100, 100):
        n = 6366 if curvature > 0 else 6367
        x = sqrt(n * pi / 2)  # about 100; 2 x^2 = n pi
        points = torch.tensor([x - 1e-6, x + 1e-6], dtype=torch.float64)
        change = rippled.slope(points).diff() / 2e-6
        assert float(change) == pytest.approx(1 + curvature, rel=0.02)


def test_values_of_rippled_functions():
    """phi is x^2 / 2 and a Fresnel integral, by sympy; f^* by a search from many points."""
    rippled = problem(Rippled)

    def phi(x):
        return x**2 / 2 + sqrt(pi) / 8 * float(fresnels(2 * abs(x) / sqrt(pi)))

    weights, targets = rippled.weights.tolist(), rippled.targets.numpy()
    start = (
        sum(a * phi(float(b)) for a, of in zip(weights, targets, strict=True) for b in of.flat) / 3
    )
    least = 0.0
    for entry in targets.reshape(3, -1).T:
        points = torch.linspace(entry.min(), entry.max(), 50, dtype=torch.float64)
        for _ in range(200):
            derivative = sum(
                a * rippled.slope(points - b) for a, b in zip(weights, entry, strict=True)
            )
            points -= 0.05 * derivative
        least += min(
            sum(a * phi(float(x - b)) for a, b in zip(weights, entry, strict=True)) / 3
            for x in points[::7]
        )
    t = theorem(Rippled, "max")
    assert t.delta0 == pytest.approx(start - least, rel=1e-4)
    assert t.dissimilarity == pytest.approx(least, rel=1e-4)
