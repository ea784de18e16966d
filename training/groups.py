"""Process groups of one job, which end with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from training.workers import RunError, Workers


@contextmanager
def groups_of_a_job(workers: Workers) -> Iterator[None]:
    """Destroy, at its end, the process groups that it made, but meshes'; also after a RunError.

    After another error the process ends, and other ranks may be lost already.
    """
    before, failure = {*_world.pg_map}, None
    try:
        yield
    except RunError as error:
        failure = error
    workers.gather(None)  # all ranks are done with them
    of_meshes = (group for mesh in workers.meshes.values() for group in mesh.get_all_groups())
    kept = before.union(of_meshes)
    for group in [group for group in _world.pg_map if group not in kept]:
        dist.destroy_process_group(group)
    if failure:
        raise failure
