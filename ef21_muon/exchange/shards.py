"""Layers that the ranks of a worker hold in shards, and that one of them steps whole.

torch's `fully_shard` keeps of every parameter some rows on each rank. A step is of a matrix, so the
rank whose lane has the layer gathers its rows and those of its gradient, steps the whole, and sends
every rank its rows again. W is what the shards hold, also for the root of the model: call
fully_shard(root, reshard_after_forward=True), or it computes on with what it has gathered before.
"""

import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from ef21_muon.exchange.host import sends_from_host

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor: torch makes none before torch.distributed.tensor is imported.

    That takes a third as long as torch itself.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def require_whole(parameters: list[Tensor], optimizer: str) -> None:
    """Raise ValueError for a parameter of which this process has a part alone, or no values."""
    for parameter in parameters:
        if is_sharded(parameter):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is sharded: {optimizer} steps whole"
                " matrices; give HierarchicalEF21Muon, or the lanes of LocalSteps, worker_size="
                f"{parameter.device_mesh.size()}"
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
            f"a parameter of shape {tuple(parameter.shape)} is on the meta device and has no "
            "values: load or initialise the model first"
        )


def require_shards(parameter: "DTensor", ranks: list[int]) -> None:
    """Raise ValueError unless the ranks of this worker alone hold it, in rows."""
    from torch.distributed.tensor import Shard

    require_values(parameter)
    mesh = parameter.device_mesh
    if mesh.ndim != 1 or parameter.placements != (Shard(0),):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is placed as {parameter.placements} on "
            f"a mesh of {mesh.ndim} dimensions: shard its rows alone, by fully_shard over a mesh "
            "of one dimension, the ranks of a worker"
        )
    if (held := mesh.mesh.tolist()) != ranks:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is sharded over ranks {held}, and the "
            f"ranks of this worker are {ranks}: give the mesh of its ranks, and worker_size="
            f"{len(held)}"
        )


class Shards:
    """Sharded layers and who steps them.

    holders: every parameter with the rank that steps it; ranks: those of the worker. `whole` has of
    every layer that this rank steps a copy, a plain Parameter.
    """

    def __init__(
        self,
        holders: list[tuple["DTensor", int]],
        ranks: list[int],
        group: dist.ProcessGroup,
    ):
        for parameter, _ in holders:
            require_shards(parameter, ranks)
        if sends_from_host(group, local(holders[0][0]).device):
            raise ValueError(
                "the ranks of a worker exchange shards from GPU to GPU, which gloo does not: give "
                "every rank a GPU and the group NCCL, or leave the model whole"
            )
        self.holders, self.ranks, self.group = holders, ranks, group
        self.rank = dist.get_rank()
        self.whole = {
            parameter: Parameter(torch.empty(parameter.shape, dtype=parameter.dtype,
                                             device=local(parameter).device))
            for parameter, holder in holders
            if holder == self.rank
        }  # fmt: skip
        self._versions: list[tuple[int, int]] = []
        self.gather_parameters()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """The layers that this rank steps, whole, as the shards are.

        Their versions count on only where somebody else has changed a shard.
        """
        rows = [local(parameter) for parameter, _ in self.holders]
        self._gather(rows, {parameter: whole.data for parameter, whole in self.whole.items()})
        if self._versions != (now := self._now()):
            increment_version(self.whole.values())
            self._versions = now

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """The gradients of the layers that this rank steps, whole; fully_shard has averaged them.

        Those of the shards are let go.
        """
        gradients = [local(parameter.grad) for parameter, _ in self.holders]
        of_dtype = {
            parameter: torch.empty_like(whole, dtype=parameter.grad.dtype)
            for parameter, whole in self.whole.items()
        }
        self._gather(gradients, of_dtype)
        for parameter, _ in self.holders:
            parameter.grad = None
        for parameter, gradient in of_dtype.items():
            self.whole[parameter].grad = gradient.to(parameter.dtype)

    @torch.no_grad()
    def scatter_parameters(self) -> None:
        """To every rank its rows of what was stepped; the whole gradients are let go."""
        transfers = []
        for parameter, holder in self.holders:
            mine = local(parameter)
            if holder != self.rank:
                transfers += self._transfer(dist.irecv, mine, holder)
                continue
            whole = self.whole[parameter].detach()
            for rank, rows in zip(self.ranks, self._rows(parameter), strict=True):
                if rank == self.rank:
                    mine.copy_(whole[rows])
                else:
                    transfers += self._transfer(dist.isend, whole[rows], rank)
            self.whole[parameter].grad = None
        self._wait(transfers)
        self._versions = self._now()

    def _gather(self, parts: list[Tensor], to: dict["DTensor", Tensor]) -> None:
        """The parts that ranks hold of every layer, to the rank that steps it."""
        transfers = []
        for (parameter, holder), mine in zip(self.holders, parts, strict=True):
            if holder != self.rank:
                transfers += self._transfer(dist.isend, mine.contiguous(), holder)
                continue
            for rank, rows in zip(self.ranks, self._rows(parameter), strict=True):
                place = to[parameter][rows]
                if rank == self.rank:
                    place.copy_(mine)
                else:
                    transfers += self._transfer(dist.irecv, place, rank)
        self._wait(transfers)

    def _transfer(self, operation, tensor: Tensor, rank: int) -> list[dist.P2POp]:
        if tensor.numel() == 0:
            return []
        return [dist.P2POp(operation, tensor, rank, self.group)]

    def _wait(self, transfers: list[dist.P2POp]) -> None:
        for work in dist.batch_isend_irecv(transfers) if transfers else []:
            work.wait()

    def _rows(self, parameter: "DTensor") -> list[slice]:
        """Of every rank, as torch.chunk cuts them; the last ones may have none."""
        count = parameter.shape[0]
        size = -(-count // len(self.ranks))
        firsts = (min(place * size, count) for place in range(len(self.ranks)))
        return [slice(first, min(first + size, count)) for first in firsts]

    def _now(self) -> list[tuple[int, int]]:
        """How often each parameter was written, as a whole and by its rows here."""
        return [(parameter._version, local(parameter)._version) for parameter, _ in self.holders]
