"""EF21-Muon and its simulation on the problems, and Muon on a convex Lipschitz function."""

from math import sqrt

import pytest
import torch
from both_ways import compared, on_two_workers
from functions import matrices
from hypothesis import given, settings
from hypothesis import strategies as st

from ef21_muon.norms.lmo import Spectral
from scripts.theory import studies as theory_studies
from scripts.theory.algorithm import (
    muon,
    on_workers,
    simulate,
)
from scripts.theory.problems import Valley
from scripts.theory.studies import GEOMETRIES


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


# Convex Lipschitz functions


@settings(max_examples=15)
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


def test_error_feedback_of_the_lmo_repairs_muon():
    norm = Spectral("svd", scaling="none")
    for beta in (1.0, 0.6):
        stuck = Valley(0.1)
        for schedule in theory_studies.SCHEDULES.values():
            values = stuck.value(muon(stuck, norm, beta, schedule, 200))
            assert values.min() > 0.199
        repaired = stuck.value(muon(stuck, norm, beta, lambda k: 0.3 / sqrt(k + 1), 600, True))
        assert repaired[-100:].max() < 0.03
