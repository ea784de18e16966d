"""Compressors: what of a matrix is kept, written in a value format (`ef21_muon.messages.values`).

A compressor is a codec. C(x) is by definition decode(encode(x)), so the bytes that are logged are
the bytes that are sent. Payload sizes follow from the shape alone. All are contractive,

    E ||C(x) - x||^2 <= (1 - alpha) ||x||^2,

with the `alpha` that they document (Frobenius norm), where omega is that of the value format.
Matrices come in batches (L, m, n); every matrix is a message of its own, a row of the payload.
"""

from functools import cache
from math import gcd, sqrt
from numbers import Real

import torch
from torch import Generator, Tensor

from ef21_muon.lmo.newton_schulz import unit_largest
from ef21_muon.messages.basis import orthonormal
from ef21_muon.messages.bits import (
    check_length,
    index_bytes,
    pack_indices,
    reinterpret,
    unpack_indices,
)
from ef21_muon.messages.formats import value_format
from ef21_muon.messages.samples import generator, numbers
from ef21_muon.messages.selection import largest
from ef21_muon.messages.values import Float32, Values


class Compressor:
    """Keeps part of a matrix and writes it in the format `values`."""

    def __init__(self, values: Values | str = "float32"):
        self.values = value_format(values)

    @property
    def lossless(self) -> bool:
        """Whether C(x) = x, bit for bit."""
        return False

    def payload_bytes(self, m: int, n: int) -> int:
        """Bytes of the message for one m x n matrix."""
        raise NotImplementedError

    def alpha(self, m: int, n: int) -> float:
        """The contraction that is guaranteed for m x n matrices."""
        raise NotImplementedError

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """float32 (L, m, n) -> uint8 (L, payload_bytes(m, n)).

        `generator` drives what is random in it; None is torch's global generator.
        """
        raise NotImplementedError

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        """uint8 (L, payload_bytes(m, n)) -> float32 (L, m, n); ValueError on another length."""
        raise NotImplementedError

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor | None:
        """Which entries the messages have: bool (L, m, n), or None where they have all.

        An entry whose value was rounded to 0 was sent all the same.
        """
        raise NotImplementedError

    def sample(self, m: int, n: int) -> Tensor:
        """A message for one m x n matrix, uint8 (1, payload_bytes), alike on every machine.

        For the comparison of what machines decode it to: a compressor whose `encode` may come out
        otherwise on another processor even of small whole numbers, as by a product of matrices,
        makes it in another way. On the CPU.
        """
        return self.encode(numbers(1, m, n, below=8), generator())

    def fit(self, m: int, n: int) -> "Compressor":
        """The compressor to use for m x n matrices: dense where this one would save no byte."""
        dense = Dense(self.values)
        return self if self.payload_bytes(m, n) < dense.payload_bytes(m, n) else dense

    def title(self) -> str:
        """What is kept, as figures and tables name it."""
        raise NotImplementedError

    def __str__(self) -> str:
        """As figures and tables name it: "rank 15% natural"; float32 goes without saying."""
        exact = isinstance(self.values, Float32)
        return self.title() if exact else f"{self.title()} {self.values}"


class Dense(Compressor):
    """Every entry is kept; alpha = 1 - omega. `Dense("natural")` is the Natural compressor."""

    def title(self) -> str:
        return "identity" if self.lossless else "dense"

    @property
    def lossless(self) -> bool:
        return isinstance(self.values, Float32)

    def payload_bytes(self, m: int, n: int) -> int:
        return self.values.payload_bytes(m, n)

    def alpha(self, m: int, n: int) -> float:
        return 1 - self.values.omega(m, n)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        return self.values.encode(x, generator)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        return self.values.decode(payload, m, n)

    def sent(self, payload: Tensor, m: int, n: int) -> None:
        return None

    def fit(self, m: int, n: int) -> Compressor:
        return self


class Identity(Dense):
    """No compression: every entry as float32, alpha = 1."""

    def __init__(self):
        super().__init__(Float32())


class Fraction(Compressor):
    """A compressor that keeps a fraction, in (0, 1], of what there is."""

    def __init__(self, fraction: float, values: Values | str = "float32"):
        super().__init__(values)
        if not (isinstance(fraction, Real) and 0 < fraction <= 1):
            raise ValueError(
                f"{type(self).__name__} got fraction={fraction}: give a number above 0, at most 1"
            )
        self.fraction = float(fraction)

    def kept(self, total: int) -> int:
        """How many of `total` are kept: the nearest whole number, at least one."""
        return max(1, round(self.fraction * total))

    def percent(self) -> str:
        """The fraction, for the title."""
        return f"{100 * self.fraction:.4g}%"


class Entries(Fraction):
    """A compressor that keeps k = fraction m n entries; alpha = (1 - omega) k / (m n).

    A message holds their places and then their values.
    """

    def _place_bytes(self, total: int) -> int:
        """Bytes of the places of what is kept of `total` entries."""
        raise NotImplementedError

    def _read_places(self, places: Tensor, total: int) -> Tensor:
        """uint8 (L, _place_bytes(total)) -> int64 (L, k), all different."""
        raise NotImplementedError

    def payload_bytes(self, m: int, n: int) -> int:
        return self._place_bytes(m * n) + self.values.payload_bytes(1, self.kept(m * n))

    def alpha(self, m: int, n: int) -> float:
        k = self.kept(m * n)
        return (1 - self.values.omega(1, k)) * k / (m * n)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        positions = self._positions_of(payload, m, n)
        written = payload[:, self._place_bytes(m * n) :]
        values = self.values.decode(written, 1, self.kept(m * n))[:, 0]
        x = torch.zeros(len(payload), m * n, dtype=torch.float32, device=payload.device)
        return x.scatter_(1, positions, values).view(-1, m, n)

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor:
        return marked(self._positions_of(payload, m, n), m * n).view(-1, m, n)

    def _positions_of(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), f"{self} of a {m} x {n} matrix")
        return self._read_places(payload[:, : self._place_bytes(m * n)], m * n)


class TopK(Entries):
    """The k entries of largest magnitude, their positions as Elias-Fano coded indices."""

    def title(self) -> str:
        return f"top {self.percent()}"

    def _place_bytes(self, total: int) -> int:
        return index_bytes(total, self.kept(total))

    def _read_places(self, places: Tensor, total: int) -> Tensor:
        return unpack_indices(places, total, self.kept(total))

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x.flatten(1)
        indices = largest(x, self.kept(x.shape[1]))
        values = x.gather(1, indices)[:, None]
        return torch.cat(
            [pack_indices(indices, x.shape[1]), self.values.encode(values, generator)], 1
        )


class RandK(Entries):
    """k entries at random positions that follow from a seed of 9 bytes; no indices are sent.

    The positions are start + i stride modulo m n for i < k: a uniform start, and a stride, coprime
    to m n, out of 256. So every entry is kept with probability k / (m n), which is all that the
    contraction needs.
    """

    SEED_BYTES = 9

    def title(self) -> str:
        return f"random {self.percent()}"

    def _place_bytes(self, total: int) -> int:
        return self.SEED_BYTES

    def _read_places(self, places: Tensor, total: int) -> Tensor:
        stride = places[:, :1].to(torch.int64)
        return self._positions(reinterpret(places[:, 1:], torch.int64), stride, total)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x.flatten(1)
        options = {"generator": generator, "device": x.device}
        start = torch.randint(x.shape[1], (len(x), 1), **options)
        stride = torch.randint(256, (len(x), 1), **options)
        values = x.gather(1, self._positions(start, stride, x.shape[1]))[:, None]
        seed = [stride.to(torch.uint8), start.view(torch.uint8)]
        return torch.cat([*seed, self.values.encode(values, generator)], 1)

    def _positions(self, start: Tensor, stride: Tensor, total: int) -> Tensor:
        strides = _coprimes(total, start.device)[stride]
        steps = torch.arange(self.kept(total), device=start.device)
        return (start + strides * steps) % total


class RankK(Fraction):
    """The projection of x on r directions of its shorter side, r = fraction min(m, n), as factors.

    For m <= n: P is an orthonormal basis of range(x x^T S) for a Gaussian m x r sketch S (range
    finder with one power step, Halko et al., arXiv:0909.4061), Q = P^T x, and P^T and Q are sent,
    so that a row of either belongs to one direction; C(x) = P Q. For m > n the same of x^T.

    A projection, so contractive for any basis; over random sketches it keeps at least the share
    c = r / min(m, n) of ||x||^2. Unbiased rounding of the factors, by omega_P and omega_Q a row,
    costs (1 + omega_P) (1 + omega_Q) - 1 of what is kept, so

        alpha = (2 - (1 + omega_P) (1 + omega_Q)) c,

    and biased rounding is only bounded by the triangle inequality,

        alpha = 1 - (sqrt(1 - c) + d sqrt(c))^2,  1 + d = (1 + sqrt(omega_P)) (1 + sqrt(omega_Q)),

    with c at least d^2 / (1 + d^2), where this is worst. Below 0 it promises nothing. Formats with
    a scale keep these promises with a scale a row.
    """

    def title(self) -> str:
        return f"rank {self.percent()}"

    def payload_bytes(self, m: int, n: int) -> int:
        r = self.kept(min(m, n))
        return self.values.payload_bytes(r, m) + self.values.payload_bytes(r, n)

    def alpha(self, m: int, n: int) -> float:
        r = self.kept(min(m, n))
        share = r / min(m, n)
        omegas = self.values.omega(r, m), self.values.omega(r, n)
        if self.values.unbiased:
            return (2 - (1 + omegas[0]) * (1 + omegas[1])) * share
        error = (1 + sqrt(omegas[0])) * (1 + sqrt(omegas[1])) - 1
        share = max(share, error**2 / (1 + error**2))
        return 1 - (sqrt(1 - share) + error * sqrt(share)) ** 2

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x if x.shape[1] <= x.shape[2] else x.mT
        rank = self.kept(x.shape[1])
        size = len(x), x.shape[1], rank
        sketch = torch.randn(size, generator=generator, dtype=torch.float32, device=x.device)
        sketch = unit_largest(x @ unit_largest(x.mT @ sketch))
        basis = orthonormal(sketch)
        factors = basis.mT, basis.mT @ x
        return torch.cat([self.values.encode(factor, generator) for factor in factors], 1)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), f"{self} of a {m} x {n} matrix")
        short, long = sorted((m, n))
        rank = self.kept(short)
        split = self.values.payload_bytes(rank, short)
        basis = self.values.decode(payload[:, :split], rank, short)
        rows = self.values.decode(payload[:, split:], rank, long)
        return basis.mT @ rows if m <= n else rows.mT @ basis

    def sent(self, payload: Tensor, m: int, n: int) -> None:
        return None

    def sample(self, m: int, n: int) -> Tensor:
        short, long = sorted((m, n))
        rank = self.kept(short)
        factors = numbers(1, rank, short), numbers(1, rank, long)
        return torch.cat([self.values.encode(factor, generator()) for factor in factors], 1)


def marked(positions: Tensor, total: int) -> Tensor:
    """int64 (L, k) -> bool (L, total), True at the positions."""
    marks = torch.zeros(len(positions), total, dtype=torch.bool, device=positions.device)
    return marks.scatter_(1, positions, True)


@cache
def _coprimes(total: int, device: torch.device) -> Tensor:
    """256 numbers coprime to `total`, spread over its range; repeated where it has fewer."""
    found = []
    for place in range(256):
        number = max(1, total * place // 256)
        while gcd(number, total) > 1:
            number += 1
        found.append(number)
    return torch.tensor(found, device=device)
