"""The process groups of a job end with the job."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from training.workers import RunError, Workers


@contextmanager
def groups_of_a_job(workers: Workers) -> Iterator[None]:
    """Destroy, at its end, the process groups made inside it, except those of meshes.

    Also after a RunError. After any other error the process ends, and ranks may be lost already.
    """
    before, failure = {*_world.pg_map}, None
    try:
        yield
    except RunError as error:
        failure = error
    workers.gather(None)  # wait until all ranks are done with the groups
    of_meshes = (group for mesh in workers.meshes.values() for group in mesh.get_all_groups())
    kept = before.union(of_meshes)
    for group in [group for group in _world.pg_map if group not in kept]:
        dist.destroy_process_group(group)
    if failure:
        raise failure
