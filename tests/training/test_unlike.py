"""Runs on unlike processors."""

from logs import repeatable
from unlike_machines import OTHER, train_on_all


def test_local_steps_train_on_unlike_processors(small, tmp_path):
    """Which draw other weights from one seed; agreement is checked after the last step."""
    train_on_all(
        [{}, OTHER],
        *small,
        "optimizer=local",
        "optimizer.sync_every=2",
        f"directory={tmp_path}/run",
    )
    assert repeatable(tmp_path / "run")[-1]["status"] == "completed"
