"""Runs on unlike processors."""

import pytest
from logs import repeatable
from unlike_machines import OTHER, train_on_all


@pytest.mark.slow
def test_local_steps_train_on_unlike_processors(small, tmp_path):
    """Which draw other weights from one seed; agreement is checked after the last step.

    A quick test in test_sharding.py shows that ranks take the weights of rank 0.
    """
    train_on_all(
        [{}, OTHER],
        *small,
        "optimizer=local",
        "optimizer.sync_every=2",
        f"directory={tmp_path}/run",
    )
    assert repeatable(tmp_path / "run")[-1]["status"] == "completed"
