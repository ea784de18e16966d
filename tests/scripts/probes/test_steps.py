"""Kinds of steps on the probes' page have the losses of the study's logs."""

import pytest
from run import ROOT
from study_page import end, gap, last_of, section, seeds_of, table_after

from scripts.shakespeare.runs import SETTINGS

PAGE = (ROOT / "results" / "probes" / "README.md").read_text()
TEXT = " ".join(PAGE.split())
MUON = "muon_feedback/without"


@pytest.mark.parametrize(
    ("heading", "folder"),
    [
        ("Muon with error feedback of its steps", "muon_feedback"),
        ("Signs before and after the LMO", "signs"),
    ],
)
def test_runs_of_one_worker_have_the_losses_of_their_logs(heading, folder):
    names = [name for name in SETTINGS if name.startswith(f"{folder}/")]
    assert len(names) == 5
    for name in names:
        assert f"| {end(name):.4f}" in section(heading, PAGE)
        over = gap(name, "muon_feedback/without")
        if len(seeds_of(name)) == 3 and name != "muon_feedback/without":
            assert f" | {over:+.1f} %" in section(heading, PAGE)


def test_signs_stand_beside_the_work_whose_claim_it_is():
    theirs = {"before": (3.3203, 3.2959), "after": (3.2860, 3.2881)}
    for place, losses in theirs.items():
        here = gap(f"signs/{place}-ef21", f"signs/{place}-none")
        there = 100 * (losses[0] / losses[1] - 1)
        order = "as" if (here > 0) == (there > 0) else "unlike"
        assert (
            f"{place} the LMO the final loss with EF21 is {here:+.1f} % from that without "
            f"feedback, {order} there ({there:+.1f} %)"
        ) in TEXT


def test_the_best_radius_of_feedback_is_worse_with_every_seed():
    feedback = {radius: f"muon_feedback/with-radius{radius}" for radius in (15, 60, 250, 1000)}
    first = {radius: last_of(name)[0]["test_loss"] for radius, name in feedback.items()}
    assert min(first, key=first.get) == 1000
    assert "with 3 of 3 seeds: the claim holds here" in TEXT
    for seed in range(3):
        with_it, without = (
            last_of(n, seed)[0]["test_loss"] for n in (feedback[1000], "muon_feedback/without")
        )
        assert with_it > without


def test_kinds_of_momentum_have_the_losses_of_their_logs():
    _, rows = table_after("Kinds of momentum", PAGE)
    found = []
    for message, kind, steps, gradients, loss in rows:
        name = "identity" if message == "identity" else "fitted9"
        short = kind.replace(", gamma ", "")
        mine = name if steps == "600" else f"momentum/{short}-{name}"
        assert loss == f"{end(mine):.4f}"
        assert last_of(mine)[0]["step"] == int(steps)
        assert int(gradients) == int(steps) * (1 if kind == "polyak" else 2)
        found.append(mine)
    assert sorted(found) == sorted(
        ["identity", "fitted9", *(name for name in SETTINGS if name.startswith("momentum/"))]
    )
