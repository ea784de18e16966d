"""Who is the server of which layer, and the collectives of a step.

Every layer has owners, the ranks that play the server for it. All messages are uint8 buffers, one
each way for a bucket of batches and a pair of ranks: from workers to servers (w2s) and back (s2w).
All sizes follow from shapes, so no sizes travel. A message to oneself never leaves the rank.

Between pairs they go as one batch of sends and receives: gloo's `all_to_all_single` uses a link in
one direction at a time (20 MB each way between two nodes at 100 Mbit/s: 3.1 s, and 1.6 s so).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

PLACEMENTS = ("rank0", "sharded", "replicated")
# Its name from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def spread(costs: list[int], ranks: int) -> list[int]:
    """A rank for each layer: dealt out by decreasing cost, each to the rank with the least so far.

    costs: what the LMO of each layer takes, in multiplications.
    """
    load = [0] * ranks
    owners = [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        owner = min(range(ranks), key=load.__getitem__)
        owners[layer] = owner
        load[owner] += costs[layer]
    return owners


def owned_layers(spread_over: list[int], server: str, ranks: int) -> list[slice]:
    """The layers of a batch that each rank owns, by placement.

    spread_over: the rank that `spread` chose for each layer, in increasing order. `rank0`: rank 0
    owns all; `sharded`: as spread; `replicated`: every rank owns all. Raises ValueError for another
    name.
    """
    if server not in PLACEMENTS:
        raise ValueError(f"server={server!r} is not a placement: choose {', '.join(PLACEMENTS)}")
    layers = len(spread_over)
    if server == "replicated":
        return [slice(0, layers)] * ranks
    if server == "rank0":
        return [slice(0, layers)] + [slice(layers, layers)] * (ranks - 1)
    bounds = [sum(owner < rank for owner in spread_over) for rank in range(ranks + 1)]
    return [slice(*bounds[rank : rank + 2]) for rank in range(ranks)]


def cut(sizes: list[int], parts: int) -> list[range]:
    """Cut a sequence into at most `parts` runs, each with about the same sum of sizes."""
    ends, total, done = [], sum(sizes), 0
    for place, size in enumerate(sizes, 1):
        done += size
        if done * parts >= total * (len(ends) + 1):
            ends.append(place)
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in the group and the group's size; alone without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


class Exchange:
    """The collectives of one round, for batches of layers with fixed payload sizes.

    owned[b][r]: the layers of batch b that rank r owns; w2s_sizes[b], s2w_sizes[b]: payload bytes
    of one layer of batch b in either direction. Without an initialised process group there is one
    rank, and nothing is sent. Where every rank owns every layer, nothing is sent back.
    """

    def __init__(
        self,
        owned: list[list[slice]],
        w2s_sizes: list[int],
        s2w_sizes: list[int],
        group: dist.ProcessGroup | None = None,
    ):
        self.group = group
        self.rank, self.ranks = place_in(group)
        self.owned, self.w2s_sizes, self.s2w_sizes = owned, w2s_sizes, s2w_sizes
        layers = [max(part.stop for part in parts) for parts in owned]
        self.replicated = all(
            part == slice(0, count)
            for count, parts in zip(layers, owned, strict=True)
            for part in parts
        )
        # Of one worker's message to the servers, and of the servers' message to every worker.
        self.w2s_bytes = sum(c * size for c, size in zip(layers, w2s_sizes, strict=True))
        self.s2w_bytes = sum(c * size for c, size in zip(layers, s2w_sizes, strict=True))
        if self.replicated and self.ranks > 1:
            self.s2w_bytes = 0

    def wire_tx_bytes(self, rank: int) -> int:
        """Bytes that a rank hands to the network in one round."""
        every = range(len(self.owned))
        others = [other for other in range(self.ranks) if other != rank]
        to_servers = sum(sum(self._lengths(self.w2s_sizes, other, every)) for other in others)
        if self.replicated:
            return to_servers
        return to_servers + len(others) * sum(self._lengths(self.s2w_sizes, rank, every))

    def to_servers(self, payloads: list[Tensor], bucket: range) -> Callable[[], list]:
        """Start to send every layer's payload to its owners.

        payloads: for every batch of the bucket uint8 (layers, w2s size). Returns a function that
        waits and gives for every batch of the bucket, of each worker, (layers owned here, w2s
        size).
        """
        if self.ranks == 1:
            return lambda: [(payload,) for payload in payloads]
        receivers = [self.rank] if self.replicated else range(self.ranks)
        messages = [
            torch.cat(
                [p[self.owned[b][rank]].flatten() for b, p in zip(bucket, payloads, strict=True)]
            )
            for rank in receivers
        ]
        mine = sum(self._lengths(self.w2s_sizes, self.rank, bucket))
        if self.replicated:
            flat = messages[0].new_empty(self.ranks * mine)
            works = [all_gather(flat, messages[0], self.group, async_op=True)]
            received = list(flat.view(self.ranks, mine))
        else:
            received = [messages[0].new_empty(mine) for _ in range(self.ranks)]
            works = self._swap(messages, received)

        def receive() -> list[tuple[Tensor, ...]]:
            for work in works:
                work.wait()
            of_workers = [
                self._rows(part[None], self.w2s_sizes, self.rank, bucket) for part in received
            ]
            return [tuple(r[0] for r in rows) for rows in zip(*of_workers, strict=True)]

        return receive

    def to_workers(self, payloads: list[Tensor], bucket: range) -> Callable[[], list[Tensor]]:
        """Start to send the payloads of the layers owned here to every rank.

        payloads: for every batch of the bucket uint8 (layers owned here, s2w size). Returns a
        function that waits and gives for every batch of the bucket (layers, s2w size).
        """
        if self.replicated:
            return lambda: payloads
        message = torch.cat([payload.flatten() for payload in payloads])
        received = [
            message.new_empty(sum(self._lengths(self.s2w_sizes, rank, bucket)))
            for rank in range(self.ranks)
        ]
        works = self._swap([message] * self.ranks, received)

        def receive() -> list[Tensor]:
            for work in works:
                work.wait()
            by_owner = [
                self._rows(part[None], self.s2w_sizes, rank, bucket)
                for rank, part in enumerate(received)
            ]
            return [torch.cat([rows[0] for rows in batch]) for batch in zip(*by_owner, strict=True)]

        return receive

    def _swap(self, messages: list[Tensor], buffers: list[Tensor]) -> list[dist.Work]:
        """Start to send message r to rank r of the group and to receive buffer r from it."""
        buffers[self.rank].copy_(messages[self.rank])
        transfers = [
            dist.P2POp(operation, tensors[rank], group=self.group, group_peer=rank)
            for rank in range(self.ranks)
            for operation, tensors in ((dist.isend, messages), (dist.irecv, buffers))
            if rank != self.rank and len(tensors[rank])
        ]
        return dist.batch_isend_irecv(transfers) if transfers else []

    def _lengths(self, sizes: list[int], rank: int, bucket: range) -> list[int]:
        """Bytes of what `rank` owns of each batch of the bucket."""
        owned = [self.owned[b][rank] for b in bucket]
        return [(o.stop - o.start) * sizes[b] for o, b in zip(owned, bucket, strict=True)]

    def _rows(self, received: Tensor, sizes: list[int], owner: int, bucket: range) -> list[Tensor]:
        """Split what `owner` owns, (senders, bytes), into (senders, layers, size) per batch."""
        parts = received.split(self._lengths(sizes, owner, bucket), 1)
        return [part.unflatten(1, (-1, sizes[b])) for part, b in zip(parts, bucket, strict=True)]
