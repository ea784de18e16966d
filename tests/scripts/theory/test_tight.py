"""Tight rates of error feedback: records, and what they say by other code than that of the script.

A round of EF or EF21 on a parabola of curvature h, with C(x) = c x, is a 2 x 2 matrix, and V falls
in the end by the square of its spectral radius.
"""

import json
from math import sqrt

import numpy as np
import pytest

from scripts.theory import tight
from training.config import ROOT

FOLDER = ROOT / "results/theory"
RECORDS = [json.loads(line) for line in (FOLDER / "tight.jsonl").read_text().splitlines()]
RATES = [one for one in RECORDS if one["record"] == "rate"]


def round_of(method, h, c, step):
    """What a round makes of (x, e), (x, d) or x."""
    if method == "EF":
        return np.array([[1 - c * step * h, -c], [(1 - c) * step * h, 1 - c]])
    if method == "EF21":
        return np.array([[1, -step], [c * h, 1 - c - c * step * h]])
    return np.array([[1 - c * step * h]])


def worst(one, step):
    """Of parabolas between the two extreme ones, and of compressors of the least contraction."""
    s = sqrt(one["epsilon"])
    return max(
        max(abs(np.linalg.eigvals(round_of(one["method"], h, c, step)))) ** 2
        for h in np.linspace(1 / one["kappa"], 1, 20)
        for c in (1 - s, 1 + s)
    )


def test_the_page_is_that_of_the_records():
    assert tight.report(RECORDS) == (FOLDER / "tight.md").read_text()
    assert len(RATES) == 45


@pytest.mark.parametrize("method", tight.METHODS)
def test_published_and_measured_rates_are_squares_of_spectral_radii(method):
    for one in RATES:
        if one["method"] == method:
            rate = worst(one, one["step"])
            assert one["published"] == pytest.approx(rate, rel=1e-9)
            assert one["searched"] == pytest.approx(rate, rel=1e-9)
            assert one["measured"] == pytest.approx(rate, abs=1e-4)


@pytest.mark.parametrize("method", tight.METHODS)
def test_no_other_step_is_better(method):
    for one in RATES:
        if one["method"] == method:
            for factor in (0.5, 0.9, 0.98, 1.02, 1.1, 1.5):
                assert worst(one, factor * one["step"]) > one["published"]


def test_steps_that_were_swept_are_as_the_matrices_say():
    swept = [one for one in RECORDS if one["record"] in ("sweep", "code")]
    assert len(swept) == 3 * 8 + 1
    for one in swept:
        assert one["measured"] == pytest.approx(worst(one, one["step"]), abs=0.02)
    of_code, of_cgd = (
        swept[-1],
        next(r for r in RATES if (r["method"], r["kappa"], r["epsilon"]) == ("CGD", 10, 0.25)),
    )
    assert of_code["measured"] > of_cgd["measured"] + 0.005


@pytest.mark.parametrize("method", tight.METHODS)
def test_a_run_is_as_it_was_recorded(method):
    one = next(r for r in RATES if (r["method"], r["kappa"], r["epsilon"]) == (method, 10, 0.25))
    found = tight.measured(method, 10, 0.25, one["step"])
    assert found == pytest.approx(one["measured"], abs=1e-5)


def test_of_random_functions_and_compressors_none_is_worse():
    """Of EF and EF21, in five dimensions, by the methods as they are written."""
    random = np.random.default_rng(0)
    kappa, epsilon = 4.0, 0.3
    s, largest = sqrt(epsilon), {"EF": 0.0, "EF21": 0.0}

    def square(v):
        return (v**2).sum(-1)

    def compressed(v):
        """v less the largest error, in a random direction."""
        off = random.normal(size=v.shape)
        return v - s * np.sqrt(square(v) / square(off))[:, None] * off

    for _ in range(20):
        h = random.choice([1 / kappa, 1.0, 0.5], size=5)
        x, other = random.normal(size=(2, 2000, 5)) * random.choice([0.02, 0.3, 1], size=(2, 1, 5))
        step = tight.best_step("EF", kappa, epsilon)
        c = compressed(other + step * h * x)
        after = square(x - c - (other + step * h * x - c)) + square(other + step * h * x - c) / s
        before = square(x - other) + square(other) / s
        largest["EF"] = max(largest["EF"], (after / before).max())
        moved = x - step * other
        d = other + compressed(h * moved - other)
        after = square(h * moved - d) + s * square(h * moved)
        before = square(h * x - other) + s * square(h * x)
        largest["EF21"] = max(largest["EF21"], (after / before).max())
    for method, found in largest.items():
        rate = tight.published(method, kappa, epsilon)
        assert 0.7 * rate < found <= rate * (1 + 1e-9)
