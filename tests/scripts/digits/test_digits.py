"""The digits study: its report is that of its records, and its net learns."""

import sys
from math import log
from statistics import mean, stdev

import numpy as np
import pytest
import torch

from scripts.digits import run as study
from scripts.studies import read_records, select
from training.config import ROOT

FOLDER = ROOT / "results/digits"
METHODS = tuple(study.METHODS)


@pytest.fixture(scope="module")
def records():
    return read_records(FOLDER / "digits.jsonl")


@pytest.fixture(scope="module")
def page():
    return " ".join((FOLDER / "README.md").read_text().split())


def finals(records, method, key):
    runs = select(records, stage="final", method=method)
    return np.array([one[key] for one in sorted(runs, key=lambda one: one["seed"])])


def test_the_committed_report_is_that_of_the_records(records):
    assert study.report(records) == (FOLDER / "README.md").read_text()


def test_what_feedback_costs_is_in_the_records(records, page):
    (without, with_), (right, right_with) = (
        [finals(records, method, key) for method in METHODS[:2]]
        for key in ("test_loss", "test_accuracy")
    )
    cost, gain = with_ - without, 100 * (right_with - right)
    errors = [change.std(ddof=1) / np.sqrt(len(change)) for change in (cost, gain)]
    loss = f"{cost.mean():+.4f} ± {errors[0]:.4f} nats ({cost.mean() / without.mean():+.0%})"
    accuracy = f"{gain.mean():+.2f} ± {errors[1]:.2f} points"
    assert f"test loss changes by {loss}, its accuracy by {accuracy}" in page
    assert f"standard error over {len(cost)} seeds" in page and len(cost) == 30
    assert cost.mean() > 2 * errors[0] and gain.mean() < -2 * errors[1]
    from_descent = with_ - finals(records, "gradient descent", "test_loss")
    assert abs(from_descent.mean()) < from_descent.std(ddof=1) / np.sqrt(len(cost))
    for method in METHODS:
        losses = finals(records, method, "test_loss").tolist()
        assert f"| {mean(losses):.4f} ± {stdev(losses):.4f} |" in page


def test_methods_were_tuned_alike_and_inside_their_grids(records):
    seeds = {
        stage: {r["seed"] for r in records if r["stage"] == stage} for stage in ("grid", "final")
    }
    assert not seeds["grid"] & seeds["final"]
    for method in METHODS:
        grid = [r for r in records if (r["stage"], r["method"]) == ("grid", method)]
        points = {(r["radius"], r["beta"]) for r in grid}
        assert len(points) == 10 and len(grid) == 20
        losses = {}
        for point in points:
            of_point = [r["validation_loss"] for r in grid if (r["radius"], r["beta"]) == point]
            losses[point] = float("inf") if None in of_point else mean(of_point)
        best = min(losses, key=losses.get)
        radii = sorted({radius for radius, _ in points})
        assert radii[0] < best[0] < radii[-1]
        chosen = [r for r in records if (r["stage"], r["method"]) == ("final", method)]
        assert {(r["radius"], r["beta"]) for r in chosen} == {best}


@pytest.mark.parametrize("method", METHODS)
def test_the_net_learns_bars_that_differ_by_place(method):
    """A row of eight is bright, and which one is the digit's."""
    torch.manual_seed(0)
    digits = torch.arange(160) % 8
    pixels = torch.rand(160, 1, 8, 8) / 4
    pixels[torch.arange(160), 0, digits] += 0.75
    parts = dict.fromkeys(study.PARTS, (pixels, digits))
    radius = {"without": 4.0}.get(method, 64.0)
    found = study.train(parts, method, radius, 0.5, seed=0, steps=40)
    assert found["test_loss"] < 0.6 * log(8)
    if method == "with":
        assert found == study.train(parts, method, radius, 0.5, seed=0, steps=40)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert study.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("pip install -c constraints.txt '.[digits]'\n")
    assert not (tmp_path / "out").exists()
