"""Rates of momentum: short horizons run here, and what the committed records say."""

import json

import numpy as np

from scripts.theory import momentum
from training.config import ROOT

FOLDER = ROOT / "results/theory"


def records():
    return [json.loads(line) for line in (FOLDER / "momentum.jsonl").read_text().splitlines()]


def test_a_short_horizon_is_as_it_was_recorded():
    recorded = {(one["momentum"], one["rounds"]): one["measured"] for one in records()}
    for kind in momentum.ORDERS:
        found = momentum.mean_gradient_norm(kind, 64)
        assert abs(found - recorded[kind, 64]) < 0.01 * found


def test_corrected_momentum_falls_faster_by_about_what_the_rates_say():
    slopes = {}
    for kind in ("polyak", "mvr", "hessian"):
        points = [(one["rounds"], one["measured"]) for one in records() if one["momentum"] == kind]
        slopes[kind] = np.polyfit(*np.log(points).T, 1)[0]
        assert f"{slopes[kind]:.2f}" in (FOLDER / "momentum.md").read_text()
    assert -0.30 < slopes["polyak"] < -0.19
    assert all(-0.38 < slopes[kind] < -0.27 for kind in ("mvr", "hessian"))
    assert momentum.report(records()) == (FOLDER / "momentum.md").read_text()
