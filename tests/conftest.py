"""What several tests share: a small data set and a small model, as overrides."""

import numpy as np
import pytest

from data.shards import write_shard

SMALL = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "steps=4",
    "batch.sequences=4",
    "batch.per_forward=1",
    "eval.every=2",
    "eval.tokens=320",
    "log_every=1",
]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Overrides for a run of seconds: 20,480 parameters, four steps, text of 16 letters."""
    directory = tmp_path_factory.mktemp("shards")
    letters = np.random.default_rng(0).integers(0, 16, size=6000)
    write_shard(directory / "train.bin", np.repeat(letters[:5000], 2))
    write_shard(directory / "test.bin", np.repeat(letters[5000:], 2))
    return [*SMALL, f"data.train={directory}/train.bin", f"data.test={directory}/test.bin"]
