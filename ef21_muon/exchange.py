"""Who is the server of which layer, and the two collectives of a step.

Every layer has an owner, the rank that plays the server for it. A step is at most two uneven
`all_to_all_single` calls on uint8 buffers: workers to servers (w2s) and servers to workers (s2w).
All sizes follow from shapes, so no sizes travel. A message to oneself never leaves the rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

PLACEMENTS = ("rank0", "sharded")


def assign_owners(costs: list[int], placement: str, ranks: int) -> list[int]:
    """The owner of each layer.

    `rank0`: rank 0 owns all. `sharded`: layers are dealt out by decreasing cost (LMO
    multiplications), each to the rank with the least so far. Raises ValueError for another name.
    """
    if placement not in PLACEMENTS:
        raise ValueError(
            f"server={placement!r} is not a placement: choose {' or '.join(PLACEMENTS)}"
        )
    if placement == "rank0":
        return [0] * len(costs)
    load = [0] * ranks
    owners = [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        owner = min(range(ranks), key=load.__getitem__)
        owners[layer] = owner
        load[owner] += costs[layer]
    return owners


class Exchange:
    """The collectives of one round, for batches of layers with fixed payload sizes.

    counts[b][r]: layers of batch b that rank r owns; within a batch, layers are ordered by owner.
    w2s_sizes[b], s2w_sizes[b]: payload bytes of one layer of batch b in either direction.
    Without an initialised process group there is one rank, and nothing is sent.
    """

    def __init__(
        self,
        counts: list[list[int]],
        w2s_sizes: list[int],
        s2w_sizes: list[int],
        group: dist.ProcessGroup | None = None,
    ):
        self.group = group
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        self.counts, self.w2s_sizes, self.s2w_sizes = counts, w2s_sizes, s2w_sizes

    def _owned_bytes(self, sizes: list[int], rank: int) -> int:
        return sum(count[rank] * size for count, size in zip(self.counts, sizes, strict=True))

    @property
    def w2s_bytes(self) -> int:
        """Bytes of one worker's message to the servers, all layers."""
        return sum(self._owned_bytes(self.w2s_sizes, rank) for rank in range(self.ranks))

    @property
    def s2w_bytes(self) -> int:
        """Bytes of the servers' message that every worker receives, all layers."""
        return sum(self._owned_bytes(self.s2w_sizes, rank) for rank in range(self.ranks))

    @property
    def wire_tx_bytes(self) -> int:
        """Bytes that this rank hands to the network in one round."""
        to_others = self.w2s_bytes - self._owned_bytes(self.w2s_sizes, self.rank)
        return to_others + (self.ranks - 1) * self._owned_bytes(self.s2w_sizes, self.rank)

    def to_servers(self, payloads: list[Tensor]) -> list[Tensor]:
        """Send every layer's payload to its owner.

        payloads[b]: uint8 (layers of b, w2s_sizes[b]); returns for every batch
        (workers, layers of b owned here, w2s_sizes[b]).
        """
        if self.ranks == 1:
            return [payload[None] for payload in payloads]
        pieces = zip(
            *(payload.split(count) for payload, count in zip(payloads, self.counts, strict=True)),
            strict=True,
        )
        message = torch.cat([piece.flatten() for owner in pieces for piece in owner])
        owned = self._owned_bytes(self.w2s_sizes, self.rank)
        received = message.new_empty(self.ranks * owned)
        dist.all_to_all_single(
            received,
            message,
            [owned] * self.ranks,
            [self._owned_bytes(self.w2s_sizes, rank) for rank in range(self.ranks)],
            group=self.group,
        )
        return self._rows(received.view(self.ranks, owned), self.w2s_sizes, self.rank)

    def to_workers(self, payloads: list[Tensor]) -> list[Tensor]:
        """Send the payloads of the layers owned here to every rank.

        payloads[b]: uint8 (layers of b owned here, s2w_sizes[b]); returns for every batch
        (layers of b, s2w_sizes[b]).
        """
        if self.ranks == 1:
            return payloads
        message = torch.cat([payload.flatten() for payload in payloads])
        owned = [self._owned_bytes(self.s2w_sizes, rank) for rank in range(self.ranks)]
        received = message.new_empty(sum(owned))
        dist.all_to_all_single(
            received,
            message.repeat(self.ranks),
            owned,
            [owned[self.rank]] * self.ranks,
            group=self.group,
        )
        by_owner = [
            self._rows(part[None], self.s2w_sizes, rank)
            for rank, part in enumerate(received.split(owned))
        ]
        return [torch.cat([rows[0] for rows in batch]) for batch in zip(*by_owner, strict=True)]

    def _rows(self, received: Tensor, sizes: list[int], owner: int) -> list[Tensor]:
        """Split what `owner` owns, (senders, bytes), into (senders, layers, size) per batch."""
        lengths = [count[owner] * size for count, size in zip(self.counts, sizes, strict=True)]
        return [
            part.unflatten(1, (count[owner], size))
            for part, count, size in zip(
                received.split(lengths, 1), self.counts, sizes, strict=True
            )
        ]
