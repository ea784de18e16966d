"""Windows of other seeds, workers and restarts are other windows, within a worker's part."""

from itertools import product

import numpy as np
import pytest

from data.loader import TokenStream, WorkerBatches
from data.shards import write_shard

PART = 500


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    """A stream whose tokens are their positions."""
    path = tmp_path_factory.mktemp("positions") / "train.bin"
    write_shard(path, np.arange(3 * PART))
    return TokenStream([path], 3 * PART, "nothing")


def drawn(stream, seed, worker, step=None):
    """Where in its part a worker's windows begin; after a restart if a step is given."""
    batches = WorkerBatches(stream, 8, worker, 3, seed)
    if step is not None:
        batches.restart(step)
    return tuple((batches.next(16)[0][:, 0] - worker * PART).tolist())


def test_no_seed_has_the_windows_of_another_one(positions):
    """Also not another worker's."""
    assert len({drawn(positions, *one) for one in product(range(3), range(3))}) == 9


def test_a_restart_draws_windows_of_its_own(positions):
    steps = (None, 7, 8)
    assert len({drawn(positions, 1, 2, step) for step in steps}) == len(steps)
    assert drawn(positions, 1, 2, 7) == drawn(positions, 1, 2, 7)
