"""What a round asks of the busiest rank, wherever the servers of layers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ef21_muon.layers import Batch, form_batches
from ef21_muon.transport.fixed import Traffic, Transport

# Multiplications of a server's step that take as long as a byte on a link of 100 Mbit/s: of float32
# on a thread of a CPU (3.6e10 a second were measured), of bfloat16 on a GPU (6e13 on an H100).
MULTIPLICATIONS_PER_BYTE = {"cpu": 3_000, "cuda": 5_000_000}


@dataclass(frozen=True)
class Load:
    """Of a round: the bytes that the busiest rank sends or receives, whichever is more.

    multiplications: of the servers' steps, of the rank that has most of them.
    """

    bytes: int
    multiplications: int

    def weight(self, device: str) -> float:
        """Both as bytes, for a kind of device."""
        per_byte = MULTIPLICATIONS_PER_BYTE.get(device, MULTIPLICATIONS_PER_BYTE["cuda"])
        return self.bytes + self.multiplications / per_byte


def loads(
    groups: Sequence[dict], costs: list[int], ranks: int, device: str | None = None
) -> dict[str, Load]:
    """By placement, of those that the compressors allow; first the one of the least weight.

    groups: with the entries params, w2s and s2w; costs: of serving each layer; device: the kind
    that the servers' steps are taken on, by default that of the parameters.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    cost = dict(zip(map(id, parameters), costs, strict=True))
    device = device or parameters[0].device.type
    found = {}
    for server in ("sharded", "replicated", "rank0"):
        if server == "replicated" and not all(group["s2w"].lossless for group in groups):
            continue
        batches = form_batches(groups, costs, server, rank=0, ranks=ranks)
        busiest, most = 0, 0
        for rank in range(ranks):
            traffic = dry_round(batches, rank, ranks)
            busiest = max(busiest, int(traffic.wire_tx_bytes), int(traffic.wire_rx_bytes))
            owned = (p for batch in batches for p in batch.params[batch.owned_by[rank]])
            most = max(most, sum(cost[id(parameter)] for parameter in owned))
        found[server] = Load(busiest, most)
    return dict(sorted(found.items(), key=lambda one: one[1].weight(device)))


def dry_round(batches: Sequence[Batch], rank: int, ranks: int) -> Traffic:
    """What a round of these batches takes of a rank; nothing is sent."""
    transport = Transport(rank=rank, ranks=ranks)
    empty = partial(torch.empty, dtype=torch.uint8, device="meta")
    owned = [len(batch.params[batch.owned_by[rank]]) for batch in batches]
    transport.to_servers(batches, [empty(len(b.params), b.up.size) for b in batches])
    shifts = [empty(layers, b.down.size) for layers, b in zip(owned, batches, strict=True)]
    transport.to_workers(batches, shifts)
    return transport.traffic
