"""The committed results keep the bounds, redraw, and are what is known by hand."""

from fractions import Fraction
from math import sqrt

import pytest
import torch

from ef21_muon.compressors.sparse import TopK
from scripts.theory import run as theory
from scripts.theory.problems import Pulling
from scripts.theory.studies import CASES
from training.config import ROOT

COMMITTED = ROOT / "results" / "theory"


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
