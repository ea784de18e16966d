"""Compressors: what of a matrix is kept, written in a value format (`ef21_muon.values`).

A compressor is a codec. C(x) is by definition decode(encode(x)), so the bytes that are logged are
the bytes that are sent. Payload sizes follow from the shape alone. All are contractive,

    E ||C(x) - x||^2 <= (1 - alpha) ||x||^2,

with the `alpha` that they document (Frobenius norm), where omega is that of the value format.
Matrices come in batches (L, m, n); every matrix is a message of its own, a row of the payload.
"""

import torch
from torch import Generator, Tensor

from ef21_muon.bits import check_length, index_bytes, pack_indices, unpack_indices
from ef21_muon.newton_schulz import unit_largest
from ef21_muon.values import Float32, Values, value_format


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

    def fit(self, m: int, n: int) -> "Compressor":
        """The compressor to use for m x n matrices: dense where this one would save no byte."""
        dense = Dense(self.values)
        return self if self.payload_bytes(m, n) < dense.payload_bytes(m, n) else dense

    def _name(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        """As figures and tables name it: "rank 15% natural"; float32 goes without saying."""
        exact = isinstance(self.values, Float32)
        return self._name() if exact else f"{self._name()} {type(self.values).__name__.lower()}"


class Dense(Compressor):
    """Every entry is kept; alpha = 1 - omega. `Dense("natural")` is the Natural compressor."""

    def _name(self) -> str:
        return "identity" if self.lossless else "dense"

    @property
    def lossless(self) -> bool:
        return isinstance(self.values, Float32)

    def payload_bytes(self, m: int, n: int) -> int:
        return self.values.payload_bytes(m * n)

    def alpha(self, m: int, n: int) -> float:
        return 1 - self.values.omega

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        return self.values.encode(x.flatten(1), generator)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        return self.values.decode(payload, m * n).view(-1, m, n)


class Identity(Dense):
    """No compression: every entry as float32, alpha = 1."""

    def __init__(self):
        super().__init__(Float32())


class Fraction(Compressor):
    """A compressor that keeps a fraction, in (0, 1], of what there is."""

    def __init__(self, fraction: float, values: Values | str = "float32"):
        super().__init__(values)
        if not (isinstance(fraction, float | int) and 0 < fraction <= 1):
            raise ValueError(
                f"{type(self).__name__} got fraction={fraction}: give a number above 0, at most 1"
            )
        self.fraction = fraction

    def kept(self, total: int) -> int:
        """How many of `total` are kept: the nearest whole number, at least one."""
        return max(1, round(self.fraction * total))

    def _percent(self) -> str:
        return f"{100 * self.fraction:.4g}%"


class TopK(Fraction):
    """The k entries of largest magnitude, their positions as Elias-Fano coded indices.

    alpha = (1 - omega) k / (m n) with k = fraction m n.
    """

    def _name(self) -> str:
        return f"top {self._percent()}"

    def payload_bytes(self, m: int, n: int) -> int:
        k = self.kept(m * n)
        return index_bytes(m * n, k) + self.values.payload_bytes(k)

    def alpha(self, m: int, n: int) -> float:
        return (1 - self.values.omega) * self.kept(m * n) / (m * n)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x.flatten(1)
        indices = x.abs().topk(self.kept(x.shape[1]), sorted=False).indices.sort().values
        return torch.cat(
            [
                pack_indices(indices, x.shape[1]),
                self.values.encode(x.gather(1, indices), generator),
            ],
            1,
        )

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), f"{self} of a {m} x {n} matrix")
        k, index_length = self.kept(m * n), index_bytes(m * n, self.kept(m * n))
        indices = unpack_indices(payload[:, :index_length], m * n, k)
        x = torch.zeros(len(payload), m * n, device=payload.device)
        x.scatter_(1, indices, self.values.decode(payload[:, index_length:], k))
        return x.view(-1, m, n)


class RankK(Fraction):
    """The projection of x on r directions of its shorter side, r = fraction min(m, n), as factors.

    For m <= n: P is an orthonormal basis of range(x x^T S) for a Gaussian m x r sketch S (range
    finder with one power step, Halko et al., arXiv:0909.4061), Q = P^T x, and P and Q are sent;
    C(x) = P Q. For m > n the same of x^T. A projection, so contractive for any basis; over random
    sketches it keeps at least the share r / min(m, n) of ||x||^2. Rounding both factors with an
    unbiased format costs (1 + omega)^2 - 1 of what is kept, so
    alpha = (2 - (1 + omega)^2) r / min(m, n).
    """

    def _name(self) -> str:
        return f"rank {self._percent()}"

    def payload_bytes(self, m: int, n: int) -> int:
        r = self.kept(min(m, n))
        return self.values.payload_bytes(r * m) + self.values.payload_bytes(r * n)

    def alpha(self, m: int, n: int) -> float:
        return (2 - (1 + self.values.omega) ** 2) * self.kept(min(m, n)) / min(m, n)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x if x.shape[1] <= x.shape[2] else x.mT
        rank = self.kept(x.shape[1])
        sketch = torch.randn(len(x), x.shape[1], rank, generator=generator, device=x.device)
        unit = unit_largest(x)
        basis = torch.linalg.qr(unit @ (unit.mT @ sketch)).Q
        factors = basis, basis.mT @ x
        return torch.cat([self.values.encode(f.flatten(1), generator) for f in factors], 1)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), f"{self} of a {m} x {n} matrix")
        short, long = sorted((m, n))
        rank = self.kept(short)
        basis_length = self.values.payload_bytes(short * rank)
        basis = self.values.decode(payload[:, :basis_length], short * rank).view(-1, short, rank)
        rows = self.values.decode(payload[:, basis_length:], rank * long).view(-1, rank, long)
        return basis @ rows if m <= n else rows.mT @ basis.mT
