"""Compressors of low rank, and the orthonormal bases that they send."""

from math import sqrt

import torch
from torch import Generator, Tensor

from ef21_muon.compressors.base import fixed_generator, numbers
from ef21_muon.compressors.sparse import Fraction
from ef21_muon.norms.newton_schulz import unit_largest
from ef21_muon.values.base import ValueFormat, check_length, reinterpret
from ef21_muon.values.specs import value_format

# The shift relative to a bound on the largest eigenvalue of the Gram matrix. For an embedding's
# gradient, summed row by row, rounding took the smallest eigenvalue to -3.4e-5 of this bound.
SHIFT = 1e-4


class RankK(Fraction):
    """The projection on r directions, r = fraction min(m, n), sent as two factors.

        C(x) = P Q,  Q = P^T x,  P an orthonormal basis of range(x x^T S), S a Gaussian m x r matrix

    for m <= n; for m > n the same holds for x^T. This is the randomised range finder with one power
    step. In expectation it keeps at least the part c = r / min(m, n) of ||x||^2. With omega_P and
    omega_Q for the value format in the two factors, unbiased formats give

        alpha = (2 - (1 + omega_P) (1 + omega_Q)) c,

    and biased ones, by the triangle inequality,

        alpha = 1 - (sqrt(1 - c) + d sqrt(c))^2,  1 + d = (1 + sqrt(omega_P)) (1 + sqrt(omega_Q)),

    with c at least d^2 / (1 + d^2), where this is worst. An alpha below 0 guarantees
    nothing, and neither does a format with block="tensor".

    Args:
        fraction: the part of the rank that is sent, in (0, 1].
        values: the value format of both factors, an object of `ef21_muon.values` or its spec, such
            as "natural"; default "float32".

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> RankK(0.15, "natural").payload_bytes(768, 768)  # of 2359296 bytes in float32
        198720

    References:
        Halko et al., range finder (arXiv:0909.4061). Gruntkowska et al. (arXiv:2510.00643),
        Algorithm 1, C in line 4 and C_j in line 10.
    """

    kind = "rank"
    spec: tuple[str, ...] = ("rank", "fraction", "values")
    sends_all = True
    scale_bytes = 0  # the bytes of s, which come before the factors

    def _basis(self, x: Tensor, r: int, generator: Generator | None) -> Tensor:
        """Return the orthonormal basis P (L, m, r) for x (L, m, n), m <= n."""
        return range_of(x, r, generator)

    def _factors(self, m: int, n: int) -> tuple[tuple[ValueFormat, int], tuple[ValueFormat, int]]:
        """Return the formats of P^T and Q, each of r rows, and the lengths of their rows."""
        return (self.values, min(m, n)), (self.values, max(m, n))

    def payload_bytes(self, m: int, n: int) -> int:
        r = self.kept(min(m, n))
        sizes = (values.payload_bytes(r, length) for values, length in self._factors(m, n))
        return self.scale_bytes + sum(sizes)

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
        basis = self._basis(x, self.kept(x.shape[1]), generator)
        factors = basis.mT, basis.mT @ x
        return torch.cat([self.values.encode(factor, generator) for factor in factors], 1)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), self, m, n)
        (first, length), (second, other) = self._factors(m, n)
        r = self.kept(min(m, n))
        scale, payload = payload[:, : self.scale_bytes], payload[:, self.scale_bytes :]
        split = first.payload_bytes(r, length)
        basis = first.decode(payload[:, :split], r, length)
        rows = second.decode(payload[:, split:], r, other)
        if self.scale_bytes:
            rows = rows * reinterpret(scale, torch.float32)[:, :, None]
        return basis.mT @ rows if length == m else rows.mT @ basis

    def sample(self, m: int, n: int) -> Tensor:
        scale = torch.tensor([[0.7]], dtype=torch.float32, device="cpu").view(torch.uint8)
        parts = [scale[:, : self.scale_bytes]]
        for values, length in self._factors(m, n):
            factor = numbers(1, self.kept(min(m, n)), length)
            parts.append(values.encode(factor, fixed_generator()))
        return torch.cat(parts, 1)


class QuantizedRank(RankK):
    """Rank r = fraction min(m, n) in coarse formats, C(x) = s P Q, fitted by least squares.

    For m >= n, P is a basis as in `RankK`, rounded to the format `basis`. Q = P^+ x are the
    least-squares rows for this rounded P, rounded to the finer format `values`, and s is the
    least-squares scalar for both, a float32. For m < n the same holds for x^T. P has most of the
    values, and its rounding only turns the subspace. Because of s, C(x) is never further from x
    than 0 is; more is not guaranteed, alpha = 0.

    Args:
        fraction: the part of the rank that is sent, in (0, 1].
        values: the value format of Q, the factor of the shorter side, an object of
            `ef21_muon.values` or its spec; default "normal4".
        basis: the value format of P, the factor of the longer side; default "normal2".

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> QuantizedRank(0.3).payload_bytes(768, 768)  # of 2359296 bytes in float32
        133404
    """

    kind = "quantized rank"
    spec = ("quantized_rank", "fraction", "values", "basis")
    scale_bytes = 4

    def __init__(
        self,
        fraction: float,
        values: ValueFormat | str = "normal4",
        basis: ValueFormat | str = "normal2",
    ):
        super().__init__(fraction, values)
        self.basis = value_format(basis)

    def __str__(self) -> str:
        return f"{self.title()} {self.basis} x {self.values}"

    def _factors(self, m: int, n: int) -> tuple[tuple[ValueFormat, int], tuple[ValueFormat, int]]:
        return (self.basis, max(m, n)), (self.values, min(m, n))

    def alpha(self, m: int, n: int) -> float:
        return 0.0

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x if x.shape[1] >= x.shape[2] else x.mT
        long, short = x.shape[1:]
        r = self.kept(short)
        sent = [self.basis.encode(range_of(x, r, generator).mT, generator)]
        basis = self.basis.decode(sent[0], r, long)
        gram, products = basis @ basis.mT, basis @ x
        largest = products.abs().amax((1, 2), keepdim=True)
        products /= largest.masked_fill(largest == 0, 1)  # keeps squares from overflowing
        sent.append(self.values.encode(_solve(gram, products), generator))
        rows = self.values.decode(sent[1], r, short)
        length = (gram @ rows * rows).sum((1, 2))
        scale = (products * rows).sum((1, 2)) / length.masked_fill(length == 0, 1)
        return torch.cat([(scale[:, None] * largest[:, 0]).view(torch.uint8), *sent], 1)


def _solve(gram: Tensor, products: Tensor) -> Tensor:
    """Return rows Q with gram Q = products.

    `gram` may be singular, so 1e-5 of its mean diagonal is added to the diagonal.
    """
    ridge = 1e-5 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    gram = gram + ridge.masked_fill(ridge == 0, 1) * identity
    return torch.linalg.solve_ex(gram, products).result


def range_of(x: Tensor, r: int, generator: Generator | None) -> Tensor:
    """Return an orthonormal basis (L, m, r) of range(x x^T S), for x (L, m, n) and a Gaussian S."""
    size = len(x), x.shape[1], r
    sketch = torch.randn(size, generator=generator, dtype=torch.float32, device=x.device)
    return orthonormal(unit_largest(x @ unit_largest(x.mT @ sketch)))


def orthonormal(x: Tensor) -> Tensor:
    """Return orthonormal columns that span the columns of x.

    On a CPU this is a QR factorisation. On a GPU, where that takes 30 times as long, it uses
    Cholesky factors of Gram matrices, X <- X L^-T with L L^T = X^T X + shift, three times, and then
    a step X (3 - X^T X) / 2 for the lengths. Directions in which x has less than about 1e-5 of its
    length come out shorter than 1, so P P^T is never more than a projection. It does not wait for
    the device.

    Args:
        x: float32 (L, m, r), m >= r.

    Returns:
        float32 (L, m, r).

    References:
        Fukaya et al., shifted Cholesky QR (arXiv:1809.11085).
    """
    return by_gram(x) if x.is_cuda else torch.linalg.qr(x).Q


def by_gram(x: Tensor) -> Tensor:
    """Return what `orthonormal` does, by Gram matrices; squares have to be in float32's range."""
    for _ in range(3):
        products = gram(x)
        bound = products.abs().sum(-1).amax(-1, keepdim=True)
        products.diagonal(dim1=-2, dim2=-1).add_(torch.where(bound == 0, 1, SHIFT * bound))
        factor = torch.linalg.cholesky_ex(products).L
        x = torch.linalg.solve_triangular(factor, x.mT, upper=False).mT
    return torch.baddbmm(x, x, gram(x), beta=1.5, alpha=-0.5)


def gram(x: Tensor) -> Tensor:
    """Return the inner products (L, r, r) of the columns of x (L, m, r)."""
    return x.mT @ x
