"""Low rank in fewer bytes: the longer factor roughly, the shorter one fitted to it."""

import torch
from torch import Generator, Tensor

from ef21_muon.lmo.newton_schulz import unit_largest
from ef21_muon.messages.basis import orthonormal
from ef21_muon.messages.bits import check_length, reinterpret
from ef21_muon.messages.compressors import Fraction
from ef21_muon.messages.formats import value_format
from ef21_muon.messages.samples import generator, numbers
from ef21_muon.messages.values import Values

SCALE_BYTES = 4


class FittedRank(Fraction):
    """x of rank r = fraction min(m, n) as s P Q: P in the format `basis`, Q in the finer `values`.

    For m >= n: P is an orthonormal basis of range(x x^T S) for a Gaussian m x r sketch S, rounded;
    Q = P^+ x are the least-squares rows for P as it was rounded, rounded in turn; and the scalar s
    is that of least squares again. For m < n the same of x^T. The formats differ because rounding P
    only turns the subspace that is sent, while rounding Q is noise in the largest directions, and P
    has most of the values: of the MLP matrices of a GPT four fifths.

    By s, C(x) is never further from x than 0 is, whatever x and the formats: alpha = 0 is what is
    guaranteed. Of a matrix with a few large directions about the share is kept that the projection
    keeps, less what the basis' format loses of normal values.
    """

    def __init__(
        self, fraction: float, values: Values | str = "normal4", basis: Values | str = "normal2"
    ):
        super().__init__(fraction, values)
        self.basis = value_format(basis)

    def title(self) -> str:
        return f"fitted rank {self.percent()}"

    def __str__(self) -> str:
        return f"{self.title()} {self.basis} x {self.values}"

    def payload_bytes(self, m: int, n: int) -> int:
        return sum(self._sizes(m, n))

    def _sizes(self, m: int, n: int) -> tuple[int, int, int]:
        """Bytes of s, P and Q."""
        short, long = sorted((m, n))
        r = self.kept(short)
        return SCALE_BYTES, self.basis.payload_bytes(r, long), self.values.payload_bytes(r, short)

    def alpha(self, m: int, n: int) -> float:
        return 0.0

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x if x.shape[1] >= x.shape[2] else x.mT
        long, short = x.shape[1:]
        r = self.kept(short)
        size = len(x), long, r
        basis = torch.randn(size, generator=generator, dtype=torch.float32, device=x.device)
        basis = unit_largest(x @ unit_largest(x.mT @ basis))
        basis = orthonormal(basis)
        sent = [self.basis.encode(basis.mT, generator)]
        basis = self.basis.decode(sent[0], r, long)
        gram, products = basis @ basis.mT, basis @ x
        largest = products.abs().amax((1, 2), keepdim=True)
        products /= largest.masked_fill(largest == 0, 1)  # or squares would overflow
        sent.append(self.values.encode(_solve(gram, products), generator))
        rows = self.values.decode(sent[1], r, short)
        length = (gram @ rows * rows).sum((1, 2))
        scale = (products * rows).sum((1, 2)) / length.masked_fill(length == 0, 1)
        return torch.cat([(scale[:, None] * largest[:, 0]).view(torch.uint8), *sent], 1)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), f"{self} of a {m} x {n} matrix")
        short, long = sorted((m, n))
        r = self.kept(short)
        scale, basis, rows = payload.split(self._sizes(m, n), 1)
        scale = reinterpret(scale, torch.float32)[:, :, None]
        basis = self.basis.decode(basis, r, long)
        rows = self.values.decode(rows, r, short) * scale
        return basis.mT @ rows if m >= n else rows.mT @ basis

    def sent(self, payload: Tensor, m: int, n: int) -> None:
        return None

    def sample(self, m: int, n: int) -> Tensor:
        short, long = sorted((m, n))
        r = self.kept(short)
        scale = torch.tensor([[0.7]], dtype=torch.float32, device="cpu").view(torch.uint8)
        basis = self.basis.encode(numbers(1, r, long), generator())
        return torch.cat([scale, basis, self.values.encode(numbers(1, r, short), generator())], 1)


def _solve(gram: Tensor, products: Tensor) -> Tensor:
    """Rows Q with gram Q = products; gram may be singular, so 1e-5 of its diagonal is added."""
    ridge = 1e-5 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    ridge = ridge.masked_fill(ridge == 0, 1) * torch.eye(
        gram.shape[1], dtype=gram.dtype, device=gram.device
    )
    return torch.linalg.solve_ex(gram + ridge, products).result
