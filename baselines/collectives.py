"""What Dion and DeMo share: collectives that count their bytes, and batches."""

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from baselines.numbers import check_number
from ef21_muon.channel import still_where_broken
from ef21_muon.layers import Batch, named_layers
from ef21_muon.transport.fixed import Traffic, place_in


class Collectives:
    """The collectives of a process group, one packed buffer each, and the bytes they take.

    A ring all-reduce of n ranks sends 2 (n - 1) / n of the buffer, an all-gather the message n - 1
    times. Received are the sums, and the messages of the others. Without an initialised process
    group there is one worker, and nothing is sent.
    """

    sends = True
    heals = False
    stream = None

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        _, self.ranks = place_in(group)
        self.traffic = Traffic()

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over all workers of float32 tensors, by an all-reduce."""
        if not tensors:
            return []
        buffer = torch.cat([tensor.flatten() for tensor in tensors])
        size, others = buffer.nbytes, self.ranks - 1
        wire = Fraction(2 * others * size, self.ranks)
        self.traffic += Traffic(size, size, size, wire, wire)
        if self.ranks > 1:
            dist.all_reduce(buffer, group=self.group)
            buffer /= self.ranks
        parts = buffer.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, payloads: Sequence[Tensor]) -> list[Tensor]:
        """Payloads of all workers, by an all-gather: uint8 (L, bytes) -> (workers, L, bytes)."""
        if not payloads:
            return []
        message = torch.cat([payload.flatten() for payload in payloads])
        size, others = message.nbytes, self.ranks - 1
        self.traffic += Traffic(size, *[others * size] * 4)
        received = message[None]
        if self.ranks > 1:
            received = message.new_empty(self.ranks, len(message))
            dist.all_gather(list(received), message, group=self.group)
        parts = received.split([payload.numel() for payload in payloads], 1)
        return [
            part.unflatten(1, payload.shape) for part, payload in zip(parts, payloads, strict=True)
        ]


def check_numbers(group: dict) -> None:
    """Have plain numbers in a parameter group; ValueError for those outside their range."""
    for name in ("lr", "mu", "decay", "weight_decay"):
        if name in group:
            group[name] = check_number(name, group[name])


def new_batches(groups: Sequence[dict]) -> list[Batch]:
    """Parameters by group and shape, vectors apart."""
    batched = defaultdict(list)
    for index, name, parameter, shape in named_layers(groups):
        batched[index, shape, parameter.ndim < 2].append((name, parameter))
    batches = []
    for (index, shape, _), members in batched.items():
        names, params = (list(column) for column in zip(*members, strict=True))
        batches.append(Batch(index, names, params, shape, groups[index].get("transposed", False)))
    return batches


def move(batch: Batch, group: dict, direction: Tensor, length: float) -> None:
    """X <- (1 - lr weight_decay) X - length direction, with direction (L, m, n), if finite."""
    if group["weight_decay"]:
        torch._foreach_mul_(batch.params, 1 - group["lr"] * group["weight_decay"])
    direction = still_where_broken(direction, direction)
    torch._foreach_add_(batch.params, batch.as_parameters(direction), alpha=-length)
