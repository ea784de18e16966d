"""The theorems as numbers, the problems' constants, and EF21-Muon against both."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import inf, pi, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import fresnels

from ef21_muon.compressors import Identity, RankK, TopK
from ef21_muon.noneuclidean import Damping
from ef21_muon.norms import AdaptiveRadius, Spectral
from ef21_muon.theory import GeneralizedSmooth, LSmooth
from scripts import theory, theory_studies
from scripts.problems import Pulling, Quadratic, Rippled, Valley, geometry
from scripts.theory_figures import slope
from scripts.theory_runs import (
    Setting,
    error_feedback_muon,
    gradient_norms,
    muon,
    on_workers,
    simulate,
    train,
)
from scripts.theory_studies import CASES, GEOMETRIES, Case, feedback, two_workers
from training.config import ROOT

torch.set_num_threads(1)
COMMITTED = ROOT / "results" / "theory"
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
SECOND_ONES = {"L0": 1, "L1": 1, "L0_bar": 1, "L1_max": 1, "dissimilarity": 1, "delta0": 1}


# The theorems


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"L": 0}, "L=0 is outside the theorem: give a number above 0"),
        ({"alpha_D": 1.5}, "alpha_D=1.5 is outside the theorem: give a number above 0, at most 1"),
        ({"sigma": -1}, "sigma=-1 is outside the theorem: give a number of at least 0"),
        ({"workers": 1.5}, "workers=1.5 is outside the theorem"),
        ({"delta0": inf}, "delta0=inf is outside the theorem"),
        ({"rho": 2}, "rho=2 exceeds rho_bar=1"),
    ],
)
def test_constants_outside_the_assumptions_are_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        LSmooth(**(ONES | wrong))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_horizons_outside_the_assumptions_are_refused():
    for numbers in (LSmooth(**ONES), GeneralizedSmooth(**SECOND_ONES, rho=1, rho_bar=1)):
        with pytest.raises(ValueError, match="rounds=0 is outside the theorem"):
            numbers.bound(0)


# The problems


def norm_of(place, x):
    return np.linalg.norm(x, 2) if place == "spectral" else np.abs(x).max()


def dual_of(place, x):
    return np.linalg.norm(x, "nuc") if place == "spectral" else np.abs(x).sum()


matrices = st.integers(0, 10**6).map(
    lambda seed: np.random.default_rng(seed).normal(size=(2, 3, 4))
)
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


def problem(kind, m=3, k=4):
    random = torch.Generator().manual_seed(0)
    targets = torch.randn(3, m, k, generator=random, dtype=torch.float64)
    return kind(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), targets)


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


@settings(deadline=None)
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


# EF21-Muon


def compared(place):
    """A problem and a setting with everything in it, for both ways to run it."""
    setting = Setting(
        norm=geometry(place, 4, 4).norm,
        w2s=TopK(0.25),
        beta=0.5,
        radius=AdaptiveRadius(20.0, 0.0) if place == "spectral" else 0.01,
        s2w=Damping(Identity(), 0.5) if place == "spectral" else Identity(),
        first_message="exact" if place == "spectral" else "compressed",
        sigma=0.5,
    )
    return two_workers(), setting, 30, 3


def on_two_workers():
    """Of EF21Muon: the cases of `compared` and the feedback variants."""
    runs = {place: train(*compared(place)) for place in GEOMETRIES}
    return runs, feedback(two_workers(), 2, 0.1, 150)


@pytest.fixture(scope="module")
def of_two_workers():
    return on_workers(2, on_two_workers)


@pytest.mark.parametrize("place", GEOMETRIES)
def test_the_simulation_is_ef21_muon(of_two_workers, place):
    problem, *rest = compared(place)
    simulated = simulate(problem, *rest)
    assert (simulated - simulated[0]).abs().max() > 0.1
    torch.testing.assert_close(of_two_workers[0][place], simulated, rtol=0, atol=1e-5)


def test_feedback_variants_on_two_workers(of_two_workers):
    """Without feedback it stalls, EF14 ends near the minimum, EF21 in it."""
    curves = of_two_workers[1]
    assert min(curves["none"]) > 1
    assert 0.1 < min(curves["ef14"][-50:]) < max(curves["ef14"][-50:]) < 0.6
    assert curves["ef21"][-1] < 1e-5


def test_without_feedback_three_workers_diverge():
    """One round by hand; the committed results have the same factor in every round."""
    pulling, step = Pulling(), 0.02
    growth = float(1 + Fraction(11, 6) * Fraction(2, 100))
    top = TopK(1 / 3)
    messages = top.decode(top.encode(pulling.gradients(pulling.start).float()), 3, 1)
    torch.testing.assert_close(pulling.start - step * messages.mean(0), growth * pulling.start)
    norms = {
        record["feedback"]: record["gradient_norms"]
        for record in theory.read(COMMITTED / "theory.jsonl")
        if record["record"] == "feedback" and record["workers"] == 3
    }
    start = sqrt(3) * 7 / 6  # every entry of the mean gradient is (-11/2 + 9/2 + 9/2) / 3
    expected = [start * growth**k for k in range(len(norms["none"]))]
    assert norms["none"] == pytest.approx(expected, rel=1e-4)
    for variant in ("ef14", "ef21"):
        assert norms[variant][-1] < start / 50


REDUCED = [
    Case("L-smooth", "spectral", "rank", 1.0),
    Case("L-smooth", "max", "top", 1.0),
    Case("(L0, L1)-smooth", "spectral", "rank", 0.0),
    Case("(L0, L1)-smooth", "max", "rank", 0.3),
]


def passes(points, promised):
    """The checks of a measured curve: below the bound, and as steep as promised at its end."""
    below = all(point["measured"] <= point["bound"] for point in points)
    return below and slope(points, "measured") <= promised + 0.05


@pytest.mark.parametrize("case", REDUCED, ids=str)
def test_curves_with_a_rate_of_a_quarter(case):
    points = case.records((256, 1024))
    assert passes(points, -1 / 4)
    assert not passes([p | {"bound": p["bound"] / 1000} for p in points], -1 / 4)


@pytest.mark.parametrize("place", GEOMETRIES)
def test_curves_with_a_rate_of_a_half(place):
    """Without noise. The servers send all and the workers half, so that steps are longer."""
    quadratic, at = problem(Quadratic, 2, 3), geometry(place, 2, 3)
    t = quadratic.theorem(at, alpha_D=0.5)
    radius = AdaptiveRadius(1 / t.gamma(1), 0)
    setting = Setting(at.norm, RankK(0.5), 1.0, radius, Identity(), "exact")
    norms = gradient_norms(quadratic, at.norm, simulate(quadratic, setting, 4096, replicas=4))
    points = [
        {"rounds": k, "measured": sqrt(norms[:k].square().mean()), "bound": sqrt(t.bound(k))}
        for k in (1024, 4096)
    ]
    assert passes(points, -1 / 2)
    assert not passes([p | {"bound": p["bound"] / 1000} for p in points], -1 / 2)


def test_a_wrong_radius_fails_the_checks():
    """Too long for the first theorem, too short for the second."""
    quadratic, at = two_workers(), geometry("max", 4, 4)
    t = quadratic.theorem(at, alpha_D=0.25)
    radius = AdaptiveRadius(1 / (10000 * t.gamma(1)), 0)
    setting = Setting(at.norm, TopK(0.25), 1.0, radius, Identity(), "exact")
    norms = gradient_norms(quadratic, at.norm, simulate(quadratic, setting, 200))
    assert not float(norms[:-1].square().mean()) <= t.bound(200)
    case = REDUCED[3]
    points = []
    for rounds in (64, 256):
        setting = case.setting(rounds)
        setting = replace(setting, radius=setting.radius / 100)
        norms = gradient_norms(
            case.problem, setting.norm, simulate(case.problem, setting, rounds, case.replicas)
        )
        points.append(
            {"rounds": rounds, "measured": case.bounded(norms), "bound": case.bound(rounds)}
        )
    assert not passes(points, -1 / 4)


# Convex Lipschitz functions


@settings(deadline=None, max_examples=15)
@given(st.floats(0.56, 1), st.lists(st.floats(0, 10), min_size=30, max_size=30))
def test_muon_never_leaves_its_line(beta, radii):
    """For any radii, as slope = 0.1 < 2 beta - 1."""
    valley = Valley(0.1)
    models = muon(valley, Spectral("svd", scaling="none"), beta, radii.__getitem__, 30)
    sums = models[:, 0, 0] + models[:, 1, 1]
    torch.testing.assert_close(sums, torch.full_like(sums, 2.0), rtol=0, atol=1e-3)
    assert valley.value(models).min() >= 0.2 - 1e-4


@given(st.floats(0.01, 0.99), matrices, matrices)
def test_subgradients_of_the_valley(slope, pair, other):
    valley = Valley(slope)
    x, y = torch.from_numpy(pair[0, :2, :2]), torch.from_numpy(other[0, :2, :2])
    for z in (x, torch.diag(torch.diag(x)[[0, 0]])):  # and at the kink
        g = valley.subgradient(z).double()
        assert valley.value(y) >= valley.value(z) + (g * (y - z)).sum() - 1e-6


def test_error_feedback_repairs_muon():
    norm = Spectral("svd", scaling="none")
    for beta in (1.0, 0.6):
        stuck = Valley(0.1)
        for schedule in theory_studies.SCHEDULES.values():
            values = stuck.value(muon(stuck, norm, beta, schedule, 200))
            assert values.min() > 0.199
        repaired = stuck.value(
            error_feedback_muon(stuck, norm, beta, lambda k: 0.3 / sqrt(k + 1), 1500)
        )
        assert repaired[-200:].max() < 0.03


# The committed results


def test_committed_results_keep_the_bounds_and_redraw(tmp_path):
    (tmp_path / "theory.jsonl").write_bytes((COMMITTED / "theory.jsonl").read_bytes())
    assert theory.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == (COMMITTED / "README.md").read_text()
    records = theory.read(COMMITTED / "theory.jsonl")
    bounds = [record for record in records if record["record"] == "bound"]
    assert len(bounds) == len(CASES) * 6 + 4
    assert all(record["measured"] <= record["bound"] for record in bounds)
    ends = {
        (record["step_size"], record["feedback"]): record["gradient_norms"][-50:]
        for record in records
        if record["record"] == "feedback" and record["workers"] == 2
    }
    assert max(ends[0.02, "ef14"]) < min(ends[0.1, "ef14"])  # its neighbourhood shrinks
    assert max(ends[0.02, "ef21"]) < min(ends[0.02, "ef14"])
