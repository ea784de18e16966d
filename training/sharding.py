"""Workers of several ranks: their mesh, and a model sharded over the ranks of each worker."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ef21_muon.transport.mesh import new_mesh
from model import GPT
from training.workers import RunError, Workers


def new_worker_mesh(ranks_per_worker: int, workers: Workers, from_host: bool = False) -> DeviceMesh:
    """The mesh of all ranks, `ranks_per_worker` of them per worker; one for all jobs of a launch.

    All jobs share it, since torch remembers the mesh of sharded tensors and would mistake an equal
    mesh of a later job for it.

    from_host: whether messages between workers go by gloo through the host's memory, unlike those
    within a worker. Raises RunError if `ranks_per_worker` does not divide the number of ranks.
    """
    given = f"ranks_per_worker={ranks_per_worker}"
    if not dist.is_initialized():
        raise RunError(f"{given} needs a process group: use torchrun")
    if dist.get_world_size() % ranks_per_worker:
        raise RunError(f"{given} does not divide {dist.get_world_size()} ranks: give a divisor")
    if (kind := (ranks_per_worker, from_host)) not in workers.meshes:
        backend = "gloo" if from_host else None
        mesh = new_mesh(ranks_per_worker, workers.device.type, workers.timeout, backend)
        workers.meshes[kind] = mesh
    return workers.meshes[kind]


def shard(model: GPT, mesh: DeviceMesh) -> None:
    """Shard every parameter by rows over the ranks of a worker, in place.

    The model may be on the meta device, so that no rank ever has all of it. A block is whole only
    while it computes. The root too is resharded after every forward pass, so that the next pass
    uses the rows as they are then.
    """
    from torch.distributed.fsdp import fully_shard  # slow to import, and needed only here

    for block in model.blocks:
        fully_shard(block, mesh=mesh["rank"])
    fully_shard(model, mesh=mesh["rank"], reshard_after_forward=True)
