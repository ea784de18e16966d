"""DeMo: Decoupled Momentum Optimization (Peng et al., arXiv:2411.19870)."""

from collections.abc import Callable
from math import pi

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from baselines.collectives import Collectives, check_numbers, move, new_batches
from ef21_muon.checks.guards import gradients_of, guarded_step
from ef21_muon.checks.settings import whole_number
from ef21_muon.communicating import Communicating
from ef21_muon.compressors.base import value_format
from ef21_muon.compressors.sparse import ChunkPlaces
from ef21_muon.values.base import Float32, ValueFormat


class DeMo(Communicating):
    """Every worker sends its momentum's largest DCT coefficients, and all step along their sign.

    Algorithm 1 with the step of Signum: worker j keeps M_j, and a step is

        M_j = decay M_j + G_j                      accumulate
        q_j = the k largest coefficients, by magnitude, of every chunk of DCT(M_j)
        M_j = M_j - IDCT(q_j)                      what is sent leaves the momentum
        Q   = mean of q_j, for each coefficient over the workers that sent it
        X   = (1 - lr weight_decay) X - lr sign(IDCT(Q))

    for all parameters alike. The authors' code adds lr G_j to M_j, which is the same for a constant
    lr: neither top k nor the sign sees the scale. A group may have an `lr`, `decay` and
    `weight_decay` of its own. Chunks are `chunk` x `chunk`, or as large as divisors of the matrix's
    sides allow (`Chunks`).

    values: the format that coefficients are sent in, with a chunk for a row; q_j is what was sent,
    so the momentum keeps the rounding. The authors' code sends float32 and indices of 64 bits, 12
    bytes a coefficient; for 32 of 4096 it is 5.125 here with float32, and 2.25 with int8.
    """

    def __init__(
        self,
        params,
        lr: float = 0.003,
        *,
        decay: float = 0.999,
        k: int = 32,
        chunk: int = 64,
        weight_decay: float = 0.0,
        values: ValueFormat | str = "float32",
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ):
        self.k, self.chunk = whole_number("k", k, least=1), whole_number("chunk", chunk, least=1)
        self.values = value_format(values)
        defaults = {"lr": lr, "decay": decay, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            transport=Collectives(process_group),
            seed=seed,
            purposes=("values",),
            process_group=process_group,
        )
        batches = new_batches(self.param_groups)
        device = batches[0].params[0].device
        self.chunks = [Chunks(*b.shape, chunk, k, self.values, device) for b in batches]
        for batch in batches:
            batch.state["momentum"] = batch.zeros()
        self.begin(batches)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        check_numbers(self.param_groups[-1])

    @property
    def title(self) -> str:
        """The method's name in figures."""
        told = "" if isinstance(self.values, Float32) else f" {self.values}"
        return f"DeMo top {self.k} of {self.chunk}x{self.chunk}{told}"

    def step(self, closure: Callable | None = None):
        """One round of collectives, on all workers together."""
        return guarded_step(self, closure, self._take_step)

    def _take_step(self) -> None:
        with self.timer("encode"):
            messages = []
            for batch, chunks in zip(self.batches, self.chunks, strict=True):
                momentum = batch.state["momentum"]
                momentum *= self.param_groups[batch.group]["decay"]
                torch._foreach_add_(list(momentum.unbind()), gradients_of(batch, self.steps + 1))
                message = chunks.encode(chunks.transform(momentum), self.generators["values"])
                momentum -= chunks.inverse(chunks.mean(message[None]))
                messages.append(message)
        with self.timer("exchange"):
            gathered = self.transport.gather(messages)
        with self.timer("decode"):
            means = [
                chunks.mean(of_workers)
                for chunks, of_workers in zip(self.chunks, gathered, strict=True)
            ]
        with self.timer("server"):
            for batch, chunks, mean in zip(self.batches, self.chunks, means, strict=True):
                group = self.param_groups[batch.group]
                move(batch, group, chunks.inverse(mean).sign_(), group["lr"])


class Chunks(ChunkPlaces):
    """m x n matrices as chunks of DCT coefficients, and the messages of the k largest of each.

    The DCT-II of a chunk is orthonormal and two-dimensional; for a vector, (n, 1), that is
    one-dimensional. A message holds the places of coefficients and then the values.
    """

    def __init__(
        self, m: int, n: int, chunk: int, k: int, values: ValueFormat, device: torch.device
    ):
        super().__init__(m, n, chunk, k)
        self.values = values
        self.bases = [dct_basis(side).to(device) for side in self.sides]
        self.payload_bytes = self.index_bytes + values.payload_bytes(self.count, self.k)

    def transform(self, x: Tensor) -> Tensor:
        """(L, m, n) -> coefficients (L, count, size)."""
        tall, wide = self.sides
        tiles = x.reshape(len(x), self.m // tall, tall, self.n // wide, wide)
        coefficients = torch.einsum("hi,lyixj,wj->lyxhw", self.bases[0], tiles, self.bases[1])
        return coefficients.reshape(len(x), self.count, self.size)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Undo `transform`."""
        tiles = coefficients.reshape(-1, *self.grid, *self.sides)
        x = torch.einsum("hi,lyxhw,wj->lyixj", self.bases[0], tiles, self.bases[1])
        return x.reshape(-1, self.m, self.n)

    def encode(self, coefficients: Tensor, generator: Generator | None = None) -> Tensor:
        """The k largest of every chunk: (L, count, size) -> uint8 (L, payload_bytes)."""
        places = self.largest(coefficients)
        values = self.values.encode(coefficients.gather(2, places), generator)
        return torch.cat([self.pack_places(places), values], 1)

    def mean(self, of_workers: Tensor) -> Tensor:
        """uint8 (workers, L, payload_bytes) -> mean coefficients (L, count, size).

        The mean of a coefficient is over the workers that sent it, 0 where none did.
        """
        layers = of_workers.shape[1]
        total = torch.zeros(layers, self.m * self.n, dtype=torch.float32, device=of_workers.device)
        senders = torch.zeros_like(total)
        for payload in of_workers:
            positions, values = self._decode(payload)
            total.scatter_add_(1, positions, values)
            senders.scatter_add_(1, positions, torch.ones_like(values))
        return (total / senders.clamp_min_(1)).view(layers, self.count, self.size)

    def _decode(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the matrix's coefficients, increasing, and values, both (L, count k)."""
        values = self.values.decode(payload[:, self.index_bytes :], self.count, self.k)
        return self.unpack_positions(payload[:, : self.index_bytes]), values.flatten(1)


def dct_basis(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix (size, size): row i is sampled from the i-th cosine."""
    steps = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(pi / size * steps[:, None] * (steps + 0.5)) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis.float()
