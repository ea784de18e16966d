"""EF21-Muon and its simulation on the problems."""

import pytest
import torch
from run import torchrun
from workers.both_ways import HOW, options

from scripts.theory.algorithm import simulate
from scripts.theory.studies import GEOMETRIES


@pytest.fixture(scope="module")
def of_two_workers(tmp_path_factory):
    file = tmp_path_factory.mktemp("theory") / "runs.pt"
    torchrun("both_ways.py", file, ranks=2)
    return torch.load(file)


@pytest.mark.parametrize("place", GEOMETRIES)
def test_the_simulation_is_ef21_muon(of_two_workers, place):
    simulated = simulate(**HOW, **options(place))
    assert (simulated - simulated[0]).abs().max() > 0.1
    torch.testing.assert_close(of_two_workers[0][place], simulated, rtol=0, atol=1e-5)


def test_feedback_variants_on_two_workers(of_two_workers):
    """Without feedback it stalls, EF14 ends near the minimum, EF21 in it."""
    curves = of_two_workers[1]
    assert min(curves["none"]) > 1
    assert 0.1 < min(curves["ef14"][-50:]) < max(curves["ef14"][-50:]) < 0.6
    assert curves["ef21"][-1] < 1e-5
