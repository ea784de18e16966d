"""The committed results keep the bounds, have their slopes, redraw, and are known by hand."""

from dataclasses import asdict
from fractions import Fraction
from math import sqrt

import pytest
import torch

from ef21_muon.compressors.sparse import TopK
from scripts.studies import read_records, select
from scripts.theory import run as theory
from scripts.theory import studies
from scripts.theory.problems import Pulling
from training.config import ROOT

COMMITTED = ROOT / "results" / "theory"
RECORDS = read_records(COMMITTED / "theory.jsonl")


def test_without_feedback_three_workers_diverge():
    """One round by hand; the committed results have the same factor in every round."""
    pulling, step = Pulling(), 0.02
    growth = float(1 + Fraction(11, 6) * Fraction(2, 100))
    top = TopK(1 / 3)
    messages = top.decode(top.encode(pulling.gradients(pulling.start).float()), 3, 1)
    torch.testing.assert_close(pulling.start - step * messages.mean(0), growth * pulling.start)
    three = select(RECORDS, record="feedback", workers=3)
    norms = {record["feedback"]: record["gradient_norms"] for record in three}
    start = sqrt(3) * 7 / 6  # every entry of the mean gradient is (-11/2 + 9/2 + 9/2) / 3
    expected = [start * growth**k for k in range(len(norms["none"]))]
    assert norms["none"] == pytest.approx(expected, rel=1e-4)
    for variant in ("ef14", "ef21"):
        assert norms[variant][-1] < start / 50


def test_committed_results_redraw(tmp_path, drawn):
    (tmp_path / "theory.jsonl").write_bytes((COMMITTED / "theory.jsonl").read_bytes())
    assert theory.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == (COMMITTED / "README.md").read_text()
    assert [len(axes.lines) for axes in drawn["bounds"].axes] == 8 * [2]


@pytest.mark.parametrize("case", studies.CASES, ids=str)
def test_a_case_keeps_its_bound_and_slope_and_is_as_it_was_recorded(case):
    points = select(RECORDS, record="bound", **asdict(case))
    assert len(points) == len(case.horizons)
    assert all(point["measured"] <= point["bound"] for point in points)
    promised = -1 / 4
    if case.horizons[-1] == studies.LONGEST:
        promised = -1 / 2 if case.geometry == "spectral" else -0.4  # on the way
    assert theory.slope(points[-2:]) <= promised + 0.05
    (found,) = case.records([16])
    assert found["measured"] == pytest.approx(points[0]["measured"], rel=1e-3)
    assert found["bound"] == pytest.approx(points[0]["bound"])


def test_feedback_of_two_workers_ends_where_it_should():
    two = select(RECORDS, record="feedback", workers=2)
    ends = {(r["step_size"], r["feedback"]): r["gradient_norms"][-50:] for r in two}
    assert max(ends[0.02, "ef14"]) < min(ends[0.1, "ef14"])  # its neighbourhood shrinks
    assert max(ends[0.02, "ef21"]) < min(ends[0.02, "ef14"])
