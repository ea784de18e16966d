"""The theorems as numbers: against the poster, their derivation and their units."""

from dataclasses import replace
from math import inf, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.theory.bounds import GeneralizedSmooth, LSmooth

numbers = st.floats(0.1, 10)
shares = st.floats(0.01, 1)
first_theorems = st.builds(
    LSmooth,
    L=numbers,
    L_bar=numbers,
    delta0=numbers,
    rho=st.floats(0.1, 1),
    rho_bar=st.floats(1, 10),
    alpha_D=shares,
    alpha_P=shares,
    sigma=numbers,
    workers=st.integers(1, 9),
)
second_theorems = st.builds(
    GeneralizedSmooth,
    L0=numbers,
    L1=numbers,
    L0_bar=numbers,
    L1_max=numbers,
    dissimilarity=numbers,
    delta0=numbers,
    rho=st.floats(0.1, 1),
    rho_bar=st.floats(1, 10),
    alpha_D=shares,
    sigma=numbers,
    workers=st.integers(1, 9),
)
horizons = st.integers(1, 10**6)
ONES = {"L": 1, "L_bar": 1, "delta0": 1, "rho": 1, "rho_bar": 1}


def test_first_theorem_without_noise_and_compression_by_hand():
    numbers = LSmooth(**ONES)
    assert numbers.beta(10) == 1
    assert numbers.zeta(10) == 12 + 72 + 180 + 1008
    assert numbers.gamma(10) == pytest.approx(1 / (2 * sqrt(1272) + 2))
    assert numbers.bound(10) == pytest.approx(4 * (2 * sqrt(1272) + 2) / 10)


@given(first_theorems, horizons)
def test_first_theorem_against_the_poster(t, rounds):
    """The poster's formulas as they are printed, with beta's arguments as powers."""
    x = t.delta0 * t.L / (t.rho**2 * t.sigma**2 * rounds)
    arguments = [x * t.workers, x * t.alpha_D, x * t.alpha_D**2]
    beta = min(
        [1, *(argument ** (1 / p) for argument, p in zip(arguments, (2, 3, 4), strict=True))]
    )
    assert t.beta(rounds) == pytest.approx(beta)
    zeta = (t.rho_bar**2 / t.rho**2) * np.dot(
        [
            12 / beta**2,
            24 * (beta + 2) / t.alpha_P**2,
            36 * (beta**2 + 4) / t.alpha_D**2,
            144 * beta**2 * (2 * beta + 5) / (t.alpha_P**2 * t.alpha_D**2),
        ],
        [t.L**2, t.L**2, t.L_bar**2, t.L_bar**2],
    )
    assert t.zeta(rounds) == pytest.approx(zeta)
    assert t.gamma(rounds) == pytest.approx(1 / (2 * sqrt(zeta) + 2 * t.L))


@given(second_theorems, horizons)
def test_second_theorem_against_the_poster(t, rounds):
    k, s = rounds + 1, sqrt(1 - t.alpha_D)
    squares = [
        k**0.5 / (6 * t.L1**2),
        k**0.5 * (1 - s) * t.rho / (24 * s * t.rho_bar * t.L1_max**2) if s else inf,
        t.rho / (24 * t.rho_bar * t.L1_max**2),
        1,
    ]
    eta = sqrt(min(squares))
    assert t.beta(rounds) == pytest.approx(k**-0.5)
    assert t.radius(rounds) == pytest.approx(eta / k**0.75)
    bound = (
        3 * t.delta0 / (eta * k**0.25)
        + eta * t.L0 / k**0.75
        + 16 * s * t.rho_bar * t.sigma / ((1 - s) * k**0.5)
        + 8 * t.rho_bar * t.sigma / (sqrt(t.workers) * k**0.25)
        + (eta * t.rho_bar / t.rho)
        * (8 / k**0.25 + 8 * s / ((1 - s) * k**0.75))
        * (t.dissimilarity + t.L0_bar)
    )
    assert t.bound(rounds) == pytest.approx(bound)


@given(shares, shares, shares)
def test_the_posters_zeta_covers_the_derivation(alpha_P, alpha_D, beta):
    """Step 4 of the derivation at `LSmooth`, for f and for the workers."""
    s = sqrt(1 - alpha_P)
    p, c = s / (1 - s), (1 - alpha_D) * (1 + 2 / alpha_D)
    of_f = 12 / beta**2 + 24 * (beta + 2) / alpha_P**2
    of_workers = 36 * (beta**2 + 4) / alpha_D**2
    of_workers += 144 * beta**2 * (2 * beta + 5) / (alpha_P**2 * alpha_D**2)
    assert 6 * ((1 - beta) / beta + p) ** 2 <= of_f
    assert 12 * c / alpha_D * (1 + 2 * beta * p) ** 2 <= of_workers


def noise_of_the_recursions(t, rounds):
    """Steps 2 to 4 of the derivation at `LSmooth` round by round, without movement (r = 0)."""
    beta, c = t.beta(rounds), (1 - t.alpha_D) * (1 + 2 / t.alpha_D)
    variance, u, total = 1.0, 0.0, 0.0  # of B_j, in units of sigma^2
    for _ in range(rounds):
        total += 6 * variance / t.workers + 3 * u
        u = (1 - t.alpha_D / 2) * u + 2 * c * beta**2 * variance + (1 - t.alpha_D) * beta**2
        variance = (1 - beta) ** 2 * variance + beta**2
    return 4 * t.rho_bar**2 * t.sigma**2 * total / rounds


@given(first_theorems, st.integers(1, 300))
def test_noise_in_the_first_bound(t, rounds):
    start = 4 * t.delta0 / (t.gamma(rounds) * rounds)
    assert t.bound(rounds) - start >= noise_of_the_recursions(t, rounds) * (1 - 1e-9)


def test_noise_in_the_first_bound_is_not_loose():
    t = LSmooth(**ONES, alpha_D=0.25, sigma=0.1, workers=4)
    start = 4 * t.delta0 / (t.gamma(5000) * 5000)
    assert t.beta(5000) < 0.5
    assert t.bound(5000) - start <= 2 * noise_of_the_recursions(t, 5000)


@given(first_theorems, horizons, numbers, numbers, numbers)
def test_units_of_the_first_theorem(t, rounds, F, X, E):
    """In other units of f, of the norm and of the Euclidean norm everything scales with its own."""
    scaled = replace(
        t,
        L=t.L * F / X**2,
        L_bar=t.L_bar * F / X**2,
        delta0=t.delta0 * F,
        rho=t.rho * E / X,
        rho_bar=t.rho_bar * E / X,
        sigma=t.sigma * F / E,
    )
    assert scaled.beta(rounds) == pytest.approx(t.beta(rounds))
    assert scaled.gamma(rounds) == pytest.approx(t.gamma(rounds) * X**2 / F)
    assert scaled.bound(rounds) == pytest.approx(t.bound(rounds) * F**2 / X**2)


@given(second_theorems, horizons, numbers, numbers, numbers)
def test_units_of_the_second_theorem(t, rounds, F, X, E):
    """As above, where eta^2 <= 1, which has no unit, is not what limits eta."""
    scaled = replace(
        t,
        L0=t.L0 * F / X**2,
        L0_bar=t.L0_bar * F / X**2,
        L1=t.L1 / X,
        L1_max=t.L1_max / X,
        dissimilarity=t.dissimilarity * F / X**2,
        delta0=t.delta0 * F,
        rho=t.rho * E / X,
        rho_bar=t.rho_bar * E / X,
        sigma=t.sigma * F / E,
    )
    if max(t.eta(rounds), scaled.eta(rounds)) < 1:
        assert scaled.radius(rounds) == pytest.approx(t.radius(rounds) * X)
        assert scaled.bound(rounds) == pytest.approx(t.bound(rounds) * F / X)


@pytest.mark.parametrize(("sigma", "order"), [(0, -1), (1, -1 / 2)])
def test_rate_of_the_first_bound(sigma, order):
    numbers = LSmooth(**ONES, alpha_D=0.1, alpha_P=0.5, sigma=sigma)
    ratio = numbers.bound(10**14) / numbers.bound(10**12)
    assert ratio == pytest.approx(100**order, rel=0.1)
