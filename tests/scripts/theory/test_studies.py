"""Measured curves keep the bounds and have the promised slope, and a wrong radius is noticed."""

from math import sqrt

import pytest
from functions import problem

from ef21_muon.compressors import Identity, RankK, TopK
from ef21_muon.norms.lmo import AdaptiveRadius
from scripts.theory import studies
from scripts.theory.algorithm import gradient_norms, simulate
from scripts.theory.problems import Quadratic, geometry
from scripts.theory.run import slope
from scripts.theory.studies import GEOMETRIES, Case, two_workers

# Without momentum and noise.
EXACT = {"s2w": Identity(), "momentum": 0.0, "first_message": "full"}


def passes(points, promised):
    """The checks of a measured curve: below the bound, and as steep as promised at its end."""
    below = all(point["measured"] <= point["bound"] for point in points)
    return below and slope(points) <= promised + 0.05


@pytest.mark.parametrize(
    "place", [GEOMETRIES[0], *(pytest.param(one, marks=pytest.mark.slow) for one in GEOMETRIES[1:])]
)
def test_curves_with_a_rate_of_a_half(place):
    """Without noise. The servers send all and the workers half, so that steps are longer."""
    quadratic, at = problem(Quadratic, 2, 3), geometry(place, 2, 3)
    t = quadratic.theorem(at, alpha_D=0.5)
    options = {"norm": at.norm, "w2s": RankK(0.5), "radius": AdaptiveRadius(1 / t.gamma(1), 0)}
    models = simulate(quadratic, 2048, **options, **EXACT)
    norms = gradient_norms(quadratic, at.norm, models)
    points = [
        {"rounds": k, "measured": sqrt(norms[:k].square().mean()), "bound": sqrt(t.bound(k))}
        for k in (1024, 2048)
    ]
    assert passes(points, -1 / 2)
    assert not passes([p | {"bound": p["bound"] / 1000} for p in points], -1 / 2)


def test_a_radius_too_long_for_the_first_theorem_fails_the_checks():
    quadratic, at = two_workers(), geometry("max", 4, 4)
    t = quadratic.theorem(at, alpha_D=0.25)
    radius = AdaptiveRadius(1 / (10000 * t.gamma(1)), 0)
    models = simulate(quadratic, 200, norm=at.norm, w2s=TopK(0.25), radius=radius, **EXACT)
    norms = gradient_norms(quadratic, at.norm, models)
    assert not float(norms[:-1].square().mean()) <= t.bound(200)


def test_a_radius_too_short_for_the_second_theorem_fails_the_checks(monkeypatch):
    as_prescribed = studies.GeneralizedSmooth.radius
    monkeypatch.setattr(
        studies.GeneralizedSmooth, "radius", lambda self, k: as_prescribed(self, k) / 100
    )
    points = list(Case("(L0, L1)-smooth", "max", 0.3).records((64, 256)))
    assert not passes(points, -1 / 4)
