"""A model spread over the ranks of a worker, by torch's fully_shard."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from model import GPT
from training.workers import RunError, Workers


def require_shards(worker_size: int, ranks: int) -> None:
    """Raise RunError for workers whose ranks have nothing to share."""
    if worker_size == 1:
        raise RunError("shard=true needs workers of several ranks: give worker_size=2 or more")
    if worker_size < 1 or ranks % worker_size:
        raise RunError(f"worker_size={worker_size} does not divide {ranks} ranks: give a divisor")


def shard(model: GPT, worker_size: int, workers: Workers) -> None:
    """Leave of every parameter some rows on each rank of a worker, in place.

    The model may be on the meta device, so that no rank ever has all of it. A block is whole only
    while it computes. The root too is resharded after every forward pass, so that what it computes
    with next are the rows as they are then.
    """
    from torch.distributed.fsdp import fully_shard  # which takes long, where nothing is sharded

    of_workers = torch.arange(workers.count).view(-1, worker_size).tolist()
    groups = [dist.new_group(ranks, workers.timeout) for ranks in of_workers]
    mesh = DeviceMesh.from_group(groups[workers.rank // worker_size], workers.device.type)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
