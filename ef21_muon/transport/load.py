"""What a round costs the rank that has most to do, for every placement of the servers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ef21_muon.layers import Batch, form_batches
from ef21_muon.transport.fixed import Traffic, Transport

# Multiplications of a server's step that take as long as a byte on a link of 100 Mbit/s: of float32
# on one thread of a CPU (3.6e10 per second were measured), of bfloat16 on a GPU (6e13 on an H100).
MULTIPLICATIONS_PER_BYTE = {"cpu": 3_000, "cuda": 5_000_000}


@dataclass(frozen=True)
class Load:
    """The cost of one round with a placement, as the maximum over ranks.

    Attributes:
        max_traffic: the bytes that a rank sends or receives, whichever is more.
        max_multiplications: the multiplications of the servers' steps that a rank takes.
    """

    max_traffic: int
    max_multiplications: int

    def weight(self, device: str) -> float:
        """Both costs together, in bytes on a link of 100 Mbit/s.

        Args:
            device: the type of device that steps are taken on; any but "cpu" is taken for "cuda".
        """
        per_byte = MULTIPLICATIONS_PER_BYTE.get(device, MULTIPLICATIONS_PER_BYTE["cuda"])
        return self.max_traffic + self.max_multiplications / per_byte


def loads(
    groups: Sequence[dict], costs: list[int], ranks: int, device: str | None = None
) -> dict[str, Load]:
    """The load of every placement that the compressors allow, the least weight first.

    Args:
        groups: parameter groups with the entries "params", "w2s" and "s2w".
        costs: per parameter, the multiplications of its server's step.
        ranks: the number of ranks that send to each other.
        device: the type of device of the servers' steps; by default that of the parameters.

    Returns:
        The loads by the placement's name: "sharded" (LPT assignment of layers to ranks),
        "replicated" or "rank0".
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    cost = dict(zip(map(id, parameters), costs, strict=True))
    device = device or parameters[0].device.type
    found = {}
    for server in ("sharded", "replicated", "rank0"):
        if server == "replicated" and not all(group["s2w"].lossless for group in groups):
            continue
        batches = form_batches(groups, costs, server, rank=0, ranks=ranks)
        max_traffic, max_multiplications = 0, 0
        by_share: dict[tuple[int, ...], Traffic] = {}  # ranks with equal shares send as much
        for rank in range(ranks):
            share = tuple(len(batch.params[batch.owned_by[rank]]) for batch in batches)
            if share not in by_share:
                by_share[share] = dry_round(batches, rank, ranks)
            traffic = by_share[share]
            sent, received = int(traffic.wire_tx_bytes), int(traffic.wire_rx_bytes)
            max_traffic = max(max_traffic, sent, received)
            owned = (p for batch in batches for p in batch.params[batch.owned_by[rank]])
            multiplications = sum(cost[id(parameter)] for parameter in owned)
            max_multiplications = max(max_multiplications, multiplications)
        found[server] = Load(max_traffic, max_multiplications)
    return dict(sorted(found.items(), key=lambda one: one[1].weight(device)))


def dry_round(batches: Sequence[Batch], rank: int, ranks: int) -> Traffic:
    """The traffic of one round of these batches for a rank of so many; nothing is sent."""
    transport = Transport(rank=rank, ranks=ranks)
    empty = partial(torch.empty, dtype=torch.uint8, device="meta")
    owned = [len(batch.params[batch.owned_by[rank]]) for batch in batches]
    transport.to_servers(batches, [empty(len(b.params), b.up.size) for b in batches])
    shifts = [empty(layers, b.down.size) for layers, b in zip(owned, batches, strict=True)]
    transport.to_workers(batches, shifts)
    return transport.traffic
