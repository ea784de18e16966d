"""What the probes' page says of kinds of steps is so in the study's logs."""

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
    rows = section(heading, PAGE)
    names = [name for name in SETTINGS if name.startswith(f"{folder}/")]
    assert len(names) == 5
    for name in names:
        spread = f"{end(name):.4f} ±" if len(seeds_of(name)) > 1 else f"{end(name):.4f} |"
        (row,) = (line for line in rows.splitlines() if spread in line)
        assert name == MUON or f" | {gap(name, MUON):+.1f} %" in row


def test_signs_stand_beside_the_work_whose_claim_it_is():
    """Of which the page says: before the LMO as there, and after it unlike there."""
    muon, theirs = 3.2785, {"before": (3.3203, 3.2959), "after": (3.2860, 3.2881)}
    rows = section("Signs before and after the LMO", PAGE)
    for place, losses in theirs.items():
        assert end(f"signs/{place}-ef21") > end(f"signs/{place}-none")
        assert (losses[0] > losses[1]) == (place == "before")
        for loss in losses:
            assert f" | {loss:.4f} | {100 * (loss / muon - 1):+.1f} % |" in rows


def test_the_best_radius_of_feedback_is_worse_with_every_seed():
    feedback = {radius: f"muon_feedback/with-radius{radius}" for radius in (15, 60, 250, 1000)}
    first = {radius: last_of(name)[0]["test_loss"] for radius, name in feedback.items()}
    assert min(first, key=first.get) == 1000
    assert "than Muon with every seed: the claim holds here" in TEXT
    for seed in range(3):
        with_it, without = (last_of(n, seed)[0]["test_loss"] for n in (feedback[1000], MUON))
        assert with_it > without


def test_kinds_of_momentum_have_the_losses_of_their_logs():
    _, rows = table_after("Kinds of momentum", PAGE)
    found = []
    for message, kind, steps, loss, over in rows:
        name = "identity" if message == "identity" else "fitted9"
        short, polyak = kind.replace(", gamma ", ""), f"momentum/polyak-{name}"
        mine = name if steps == "600" else f"momentum/{short}-{name}"
        assert loss == f"{end(mine):.4f}"
        assert last_of(mine)[0]["step"] == int(steps)
        if kind != "polyak":
            assert over == f"{gap(mine, polyak):+.1f} %"
            assert end(mine) > end(name)  # of as many gradients
            assert (gap(mine, polyak) > 0) == ("gamma" not in kind)
        found.append(mine)
    assert sorted(found) == sorted(
        ["identity", "fitted9", *(name for name in SETTINGS if name.startswith("momentum/"))]
    )
