"""What Dion and DeMo share: batches with state by name, and collectives that count."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from baselines.numbers import check_number
from ef21_muon.communicating import CommunicatingOptimizer
from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.exchange.layers import Batch, named_layers, still_where_broken


@dataclass(kw_only=True)
class StatefulBatch(Batch):
    """Layers of one group and one shape; `state` holds float32 tensors with a row for each."""

    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_vector(self) -> bool:
        return self.params[0].ndim < 2

    def tables(self) -> Iterator[tuple[str, Tensor, slice]]:
        for name, rows in self.state.items():
            yield name, rows, slice(None)


class Collectives:
    """The collectives of a process group, one packed buffer each, and the bytes they take.

    Without an initialised process group there is one worker, and nothing is sent.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        _, self.ranks = place_in(group)
        self._taken = Traffic()

    def read(self) -> Traffic:
        """What they took since the last call.

        A ring all-reduce of n ranks sends 2 (n - 1) / n of the buffer, an all-gather the message
        n - 1 times. Received are the sums, and the messages of the others.
        """
        taken, self._taken = self._taken, Traffic()
        return taken

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over all workers of float32 tensors, by an all-reduce."""
        if not tensors:
            return []
        buffer = torch.cat([tensor.flatten() for tensor in tensors])
        size, others = buffer.nbytes, self.ranks - 1
        self._taken += Traffic(size, size, size, Fraction(2 * others * size, self.ranks))
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
        self._taken += Traffic(size, others * size, others * size, others * size)
        received = message[None]
        if self.ranks > 1:
            received = message.new_empty(self.ranks, len(message))
            dist.all_gather(list(received), message, group=self.group)
        parts = received.split([payload.numel() for payload in payloads], 1)
        return [
            part.unflatten(1, payload.shape) for part, payload in zip(parts, payloads, strict=True)
        ]


class CollectiveOptimizer(CommunicatingOptimizer):
    """A communicating optimizer whose rounds are collectives among equals: there are no servers.

    A subclass gives the batches of `_new_batches` their state, begins with them, and reads
    `collectives` at the end of a round. Raises ValueError for hyperparameters outside their range.
    """

    def __init__(self, params, defaults: dict, seed: int, process_group: dist.ProcessGroup | None):
        super().__init__(
            params, defaults, seed=seed, purposes=("values",), process_group=process_group
        )
        self.collectives = Collectives(process_group)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "mu", "decay", "weight_decay"):
            if name in group:
                group[name] = check_number(name, group[name])

    def _new_batches(self) -> list[StatefulBatch]:
        """Parameters by group and shape, vectors apart."""
        batched = defaultdict(list)
        for index, name, parameter, shape in named_layers(self.param_groups):
            batched[index, shape, parameter.ndim < 2].append((name, parameter))
        batches = []
        for (index, shape, _), members in batched.items():
            names, params = (list(column) for column in zip(*members, strict=True))
            transposed = self.param_groups[index].get("transposed", False)
            batches.append(
                StatefulBatch(
                    group=index, transposed=transposed, names=names, params=params, shape=shape
                )
            )
        return batches

    def _move(self, batch: Batch, direction: Tensor, length: float) -> None:
        """X <- (1 - lr weight_decay) X - length direction, with direction (L, m, n), if finite."""
        group = self.param_groups[batch.group]
        if group["weight_decay"]:
            torch._foreach_mul_(batch.params, 1 - group["lr"] * group["weight_decay"])
        direction = still_where_broken(direction, direction)
        torch._foreach_add_(batch.params, batch.as_parameters(direction), alpha=-length)
