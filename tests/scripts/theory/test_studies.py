"""Measured curves keep the bounds and have the promised slope, and a wrong radius is noticed."""

from dataclasses import replace
from math import sqrt

import pytest
from functions import problem

from ef21_muon.compressors.base import Identity
from ef21_muon.compressors.low_rank import RankK
from ef21_muon.compressors.sparse import TopK
from ef21_muon.norms.lmo import AdaptiveRadius
from scripts.theory.algorithm import Setting, gradient_norms, simulate
from scripts.theory.figures import slope
from scripts.theory.problems import Quadratic, geometry
from scripts.theory.studies import GEOMETRIES, Case, two_workers

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
