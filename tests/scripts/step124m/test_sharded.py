"""What a rank holds of a sharded model: measured on a small one, and the committed numbers."""

import json

from run import ROOT, torchrun

from scripts.step124m.run import SHARDED_LOG, sharded_report

SCRIPT = str(ROOT / "scripts/step124m/run.py")


def records(directory):
    return [json.loads(line) for line in (directory / "sharded.jsonl").read_text().splitlines()]


def test_two_ranks_hold_a_small_model_between_them(small, tmp_path):
    overrides = (*small, "ranks_per_worker=2", "model.layers=4")
    torchrun(SCRIPT, "--sharded", f"--out={tmp_path}", *overrides, ranks=2)
    found = records(tmp_path)
    parameters = 256 * 32 + 4 * 12 * 32**2
    for rank in found:
        assert rank["parameters"] == parameters and rank["workers"] == 1
        assert rank["whole_bytes"] == 16 * parameters  # W, M_j, G_j and G
        # Its rows, the whole of what it steps, and the state of that.
        assert rank["kept_bytes"] > 2 * parameters + 4 / 3 * rank["state_bytes"]
    assert sum(rank["state_bytes"] for rank in found) == 12 * parameters
    assert (tmp_path / "sharded.md").read_text() == sharded_report(found)


def test_no_rank_of_four_holds_more_of_124m_than_promised():
    """Twice the sum of a quarter of the whole and of the largest layer's matrix."""
    found = records(SHARDED_LOG.parent)
    parameters, largest = 123_568_128, 50304 * 768
    assert len(found) == 4
    for rank in found:
        assert rank["kept_bytes"] <= 2 * (16 * parameters / 4 + 4 * largest)
    assert sum(rank["state_bytes"] for rank in found) == 12 * parameters
    assert SHARDED_LOG.with_suffix(".md").read_text() == sharded_report(found)
