"""Muon never converges on a convex Lipschitz function, unless with error feedback of its steps."""

from math import sqrt

import torch
from functions import matrices
from hypothesis import given, settings
from hypothesis import strategies as st
from valley import Valley

SCHEDULES = {
    "constant": lambda k: 0.01,
    "root": lambda k: 0.3 / sqrt(k + 1),
    "harmonic": lambda k: 1 / (k + 1),
}


@settings(max_examples=15)
@given(st.floats(0.56, 1), st.lists(st.floats(0, 10), min_size=30, max_size=30))
def test_muon_never_leaves_its_line(beta, radii):
    """For any radii, as slope = 0.1 < 2 beta - 1."""
    valley = Valley(0.1)
    models = valley.muon(beta, radii)
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
    valley = Valley(0.1)
    for beta in (1.0, 0.6):
        for schedule in SCHEDULES.values():
            assert valley.value(valley.muon(beta, map(schedule, range(60)))).min() > 0.199
        radii = map(SCHEDULES["root"], range(600))
        repaired = valley.value(valley.muon(beta, radii, lmo_feedback=True))
        assert repaired[-100:].max() < 0.03
