"""Sharded parameters: each rank holds some of the rows, as torch's `fully_shard` leaves them."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(parameter: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor. Its module takes long to import: before that there is none."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def require_whole(parameters: Iterable[Tensor], optimizer: str) -> None:
    """Check that this process has every parameter as a whole, with values.

    Args:
        parameters: to check.
        optimizer: the name of its class, for the error.

    Raises:
        ValueError: for a parameter that is sharded, flattened or on the meta device.
    """
    for parameter in parameters:
        if is_sharded(parameter):
            raise ValueError(
                f"{named(parameter)} is sharded: {optimizer} steps whole matrices; give a "
                f"WorkerMesh with ranks_per_worker={parameter.device_mesh.size()} as mesh="
            )
        require_values(parameter)
        # As torch's first FSDP marks what it has put into one flat parameter.
        if getattr(parameter, "_is_flat_param", False) or hasattr(parameter, "_fsdp_flattened"):
            raise ValueError(
                "the model is in FullyShardedDataParallel, whose parameters are not matrices: "
                "shard it by torch.distributed.fsdp.fully_shard"
            )


def require_values(parameter: Tensor) -> None:
    """Raise ValueError for a parameter on the meta device."""
    if parameter.is_meta:
        raise ValueError(
            f"{named(parameter)} is on the meta device and has no values: load or initialise the "
            "model first"
        )


def require_shards(parameters: Iterable[Tensor], ranks: list[int]) -> None:
    """Check that all parameters are sharded by rows over exactly these ranks.

    Args:
        parameters: to check.
        ranks: the global ranks of this worker, in order.

    Raises:
        ValueError: for a parameter that is not.
    """
    from torch.distributed.tensor import DTensor, Shard

    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            raise ValueError(
                f"{named(parameter)} is whole where others are sharded: call fully_shard for the "
                "whole model, too"
            )
        require_values(parameter)
        mesh = parameter.device_mesh
        if mesh.ndim != 1 or parameter.placements != (Shard(0),):
            raise ValueError(
                f"{named(parameter)} is placed as {parameter.placements} on a mesh of {mesh.ndim} "
                "dimensions: shard its rows alone, by fully_shard over the ranks of a worker"
            )
        if (held := mesh.mesh.tolist()) != ranks:
            raise ValueError(
                f"{named(parameter)} is sharded over ranks {held}, and the ranks of this worker "
                f"are {ranks}: give the mesh of its ranks, and ranks_per_worker={len(held)}"
            )


def named(parameter: Tensor) -> str:
    """A description of a parameter that has no name, for errors."""
    return f"a parameter of shape {tuple(parameter.shape)}"
