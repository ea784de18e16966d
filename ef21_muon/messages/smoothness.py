"""A value format in the geometry of the local smoothness, as far as a diagonal tells it."""

from math import sqrt

import torch
from torch import Generator, Tensor

from ef21_muon.messages.bits import reinterpret
from ef21_muon.messages.values import Integer, Values


class SmoothnessAware(Values):
    """Dithered integers of x in the geometry of a diagonal D: C(x) = Q(x D^(-1/2)) D^(1/2).

    As smoothness-aware quantisation (Wang, Safaryan and Richtarik, arXiv:2106.03524), where D is of
    the matrix L_j for which a worker's own function is smooth, and known to the server. The loss of
    a linear layer has the diagonal E delta_i^2 E a_j^2, of what comes back to output i and what
    goes into input j (Martens and Grosse, arXiv:1503.05671). Outputs are rows, and Q is `Integer`
    with a float32 scale a row; of inputs

        D_j = c_j = max_i |x_ij|,

    which a message tells of itself, in 2 bytes a column (bfloat16). c_j grows as the root of
    E a_j^2 does, so this goes half of the way from no scaling to L_j's own, and so far nothing is
    lost in the Euclidean norm: scales of rows are at most sqrt(r_i), r_i = max_j |x_ij|, and
    sum_ij r_i c_j <= sqrt(N) ||x||^2 for N = m n, so that

        omega = (1 + 2^-7) min(sqrt(N) / (4 s^2), N^(1/4) / s),  s = 2^(bits-1) - 1,

    with sqrt(N) in the place of N for one scale a message. In the norm of D^-1 omega is that of
    `Integer`. Unbiased; `stochastic=False` takes the nearer integer, with the first of the two, at
    most 1. Of float32's range, magnitudes from 1e-37 to 1e38. Raises ValueError for other bits.
    """

    def __init__(self, bits: int = 4, stochastic: bool = True):
        if not (type(bits) is int and 2 <= bits <= 8):
            raise ValueError(f"smooth got bits={bits}: give 2 to 8")
        self.integers = Integer(bits, stochastic)
        self.stochastic = self.unbiased = stochastic

    def __str__(self) -> str:
        return f"{'' if self.stochastic else 'nearest '}smooth{self.integers.width}"

    def omega(self, rows: int, columns: int) -> float:
        total, levels = rows * columns, self.integers.levels
        spread = (1 + 2**-7) * sqrt(total) / (4 * levels**2)
        if self.stochastic:
            return min(spread, (1 + 2**-7) * total**0.25 / levels)
        return min(1.0, spread)

    def payload_bytes(self, rows: int, columns: int) -> int:
        return 2 * columns + self.integers.payload_bytes(rows, columns)

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        largest = values.abs().amax(1).to(torch.bfloat16)
        codes = self.integers.encode(values / root_of(largest), generator)
        return torch.cat([largest.view(torch.uint8), codes], 1)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        self._check(payload, rows, columns)
        split = 2 * columns
        largest = reinterpret(payload[:, :split], torch.bfloat16)
        return self.integers.decode(payload[:, split:], rows, columns).mul_(root_of(largest))


def root_of(largest: Tensor) -> Tensor:
    """D^(1/2) for c (L, columns): (L, 1, columns), with 1 in the place of 0."""
    return largest.masked_fill(largest == 0, 1).float().sqrt()[:, None]
