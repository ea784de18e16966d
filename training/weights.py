"""The weights that all workers start from."""

from functools import partial

import torch.distributed as dist
from torch import Tensor

from ef21_muon.transport.agreement import fingerprint
from ef21_muon.transport.shards import is_sharded, local
from model import GPT
from training.workers import Workers


def draw_weights(model: GPT, seed: int, workers: Workers) -> None:
    """Give a model of the meta device, whole or sharded, its values on this rank's device.

    All ranks have to call this. Another kind of processor may draw other values from the same seed:
    then all ranks take rank 0's. Only one layer at a time is whole on the CPU.
    """
    model.to_empty(device=workers.device)
    model.init_weights(seed, partial(_fill, workers))


def _fill(workers: Workers, weight: Tensor, values: Tensor) -> None:
    prints = workers.gather(fingerprint(values).item())
    if len({*prints}) > 1:
        dist.broadcast(values, 0, group=workers.control)
    own = local(weight)
    if is_sharded(weight):
        mesh = weight.device_mesh
        first = mesh.get_local_rank() * -(-len(values) // mesh.size())
        values = values[first : first + len(own)]
    own.copy_(values)
