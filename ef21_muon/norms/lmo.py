"""Norms: the geometry of the server's step.

A norm gives `lmo(G)`, the minimiser of <G, Z> over its unit ball, and `dual(G)`, its dual norm, so
that <G, lmo(G)> = -dual(G), of batches of matrices (..., d_out, d_in), as torch.nn.Linear stores
its weight; a vector of n entries comes as (n, 1). `scaling` names a scale s(d_out, d_in) by which
a norm is divided, so that lmo and dual are s times as large; formulas are those for s = 1.
"""

from math import isfinite, sqrt
from numbers import Real
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ef21_muon.norms.base import Norm
from ef21_muon.norms.newton_schulz import POLYNOMIALS, length, newton_schulz, unit_length


class Spectral(Norm):
    """sigma_max(Z); lmo(U S V^T) = -U V^T; the dual is the nuclear norm, the sum of S.

    scaling: "scion" divides by sqrt(d_out/d_in), which makes it the RMS -> RMS operator norm
    (arXiv:2502.07529), and of vectors the RMS norm; "muon" by sqrt(max(1, d_out/d_in)) and
    "moonlight" by 0.2 sqrt(max(d_out, d_in)), for steps with an RMS of 0.2 (arXiv:2502.16982):
    "original" and "match_rms_adamw" of torch.optim.Muon. method: `steps` of "jordan" or
    "polar_express" in `dtype` (see `newton_schulz`), which bring the norm of the step near 1, or
    "svd", exact and slow. The dual is always exact.
    """

    scalings: ClassVar = {
        "scion": lambda d_out, d_in: sqrt(d_out / d_in),
        "muon": lambda d_out, d_in: sqrt(max(1, d_out / d_in)),
        "moonlight": lambda d_out, d_in: 0.2 * sqrt(max(d_out, d_in)),
        **Norm.scalings,
    }
    methods = (*POLYNOMIALS, "svd")
    dtypes = (None, torch.bfloat16, torch.float32, torch.float64)

    def __init__(
        self,
        method: str = "jordan",
        steps: int = 5,
        scaling: str = "scion",
        dtype: torch.dtype | None = None,
    ):
        super().__init__(scaling)
        if method not in self.methods:
            raise ValueError(f"Spectral got method={method!r}: choose {', '.join(self.methods)}")
        if not (isinstance(steps, int) and steps >= 1):
            raise ValueError(f"Spectral got steps={steps}: give at least 1 Newton-Schulz step")
        if dtype not in self.dtypes:
            raise ValueError(f"Spectral got dtype={dtype!r}: choose one of {self.dtypes}")
        self.method, self.steps, self.dtype = method, steps, dtype

    def aligned(self, gradient: Tensor) -> Tensor:
        if self.method != "svd":
            return newton_schulz(gradient, self.steps, self.dtype, self.method)
        left, values, right = torch.linalg.svd(gradient.nan_to_num(), full_matrices=False)
        rounding = torch.finfo(values.dtype).eps * max(gradient.shape[-2:])
        kept = values > rounding * values[..., :1]  # not zero up to rounding
        return ((left * kept[..., None, :]) @ right).where(gradient.isfinite(), torch.nan)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return torch.linalg.svdvals(gradient).sum(-1)

    def exact(self) -> Norm:
        return Spectral("svd", scaling=self.scaling)

    def cost(self, d_out: int, d_in: int) -> int:
        short, long = sorted((d_out, d_in))
        if self.method == "svd":
            return short * short * (3 * long + 10 * short)
        return self.steps * short * short * (2 * long + short)


class Sign(Norm):
    """max |Z_ij|, the 1 -> infinity operator norm; lmo(G) = -sign(G); the dual is sum |G_ij|.

    scaling: "scion" divides by 1/d_in, Scion's choice for the (tied) head (arXiv:2502.07529).
    """

    scalings: ClassVar = {"scion": lambda d_out, d_in: 1 / d_in, **Norm.scalings}
    cost_per_entry = 1

    def aligned(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return gradient.abs().sum((-2, -1))


class ColumnNorm(Norm):
    """max_j ||Z_:j||; lmo(G)_:j = -G_:j / ||G_:j||; the dual is sum_j ||G_:j||.

    scaling: "scion" divides by sqrt(d_out): Scion's 1 -> RMS operator norm (arXiv:2502.07529), for
    the input layer. For a torch.nn.Embedding, which holds these columns as rows, take
    RowNorm("none") with the radius sqrt(d_in).
    """

    scalings: ClassVar = {"scion": lambda d_out, d_in: sqrt(d_out), **Norm.scalings}

    def aligned(self, gradient: Tensor) -> Tensor:
        return unit_length(gradient, -2)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return length(gradient, -2).sum(-1)


class RowNorm(Norm):
    """max_i ||Z_i:||; lmo(G)_i: = -G_i: / ||G_i:||; the dual is sum_i ||G_i:||.

    scaling: "scion" divides by 1/sqrt(d_in): Scion's RMS -> infinity operator norm
    (arXiv:2502.07529), for the output layer.
    """

    scalings: ClassVar = {"scion": lambda d_out, d_in: 1 / sqrt(d_in), **Norm.scalings}

    def aligned(self, gradient: Tensor) -> Tensor:
        return unit_length(gradient, -1)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return length(gradient, -1).sum(-1)


class Euclidean(Norm):
    """||Z||_F; lmo(G) = -G / ||G||_F; the dual is ||G||_F: normalised gradient descent.

    With an AdaptiveRadius(l0=1/gamma, l1=0) the step is -gamma G, that of gradient descent.
    """

    def aligned(self, gradient: Tensor) -> Tensor:
        return unit_length(gradient)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return length(gradient)


class BiasRMS(Euclidean):
    """||z|| / sqrt(n) of n entries, Scion's RMS norm for biases (arXiv:2502.07529).

    lmo(g) = -sqrt(n) g / ||g||; the dual is sqrt(n) ||g||.
    """

    scalings: ClassVar = {"scion": lambda d_out, d_in: sqrt(d_out * d_in)}


class Nuclear(Norm):
    """The sum of singular values; lmo(G) = -u v^T of the largest one; the dual is sigma_max(G).

    u is found by squaring the Gram matrix of the short side `SQUARINGS` times, as by 2^16 power
    iterations: <G, lmo(G)> is within 1e-4 sigma_max(G) of the minimum. Unlike an eigensolver it
    never waits for the device, nor raises for NaN.
    """

    SQUARINGS = 16

    def aligned(self, gradient: Tensor) -> Tensor:
        tall = gradient.shape[-2] > gradient.shape[-1]
        x = unit_length(gradient.mT if tall else gradient)
        power = x @ x.mT
        for _ in range(self.SQUARINGS):
            power = unit_length(power)
            power = power @ power
        largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
        left = power.gather(-1, largest.expand(*power.shape[:-1], 1))
        right = unit_length(x.mT @ left)
        left = unit_length(x @ right)
        return right @ left.mT if tall else left @ right.mT

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(gradient, 2)

    def cost(self, d_out: int, d_in: int) -> int:
        short, long = sorted((d_out, d_in))
        return short * short * (long + self.SQUARINGS * short)


class L1(Norm):
    """sum |Z_ij|; lmo(G) = -sign(G_ij) at one entry of largest magnitude, else 0; dual max |G_ij|.

    Greedy coordinate descent.
    """

    cost_per_entry = 1

    def aligned(self, gradient: Tensor) -> Tensor:
        entries = gradient.flatten(-2)
        place = entries.abs().argmax(-1, keepdim=True)
        sign = entries.gather(-1, place).sign()
        return torch.zeros_like(entries).scatter_(-1, place, sign).view(gradient.shape)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return gradient.abs().amax((-2, -1))


class Blocks(Norm):
    """max over the blocks Z_b of norm(Z_b); the LMO is that of every block, the dual is their sum.

    The `count` blocks are parts of a linear map with inputs and outputs of their own, as of a
    grouped convolution, stored below each other, or, with `columns`, side by side.
    """

    def __init__(self, norm: Norm, count: int, columns: bool = False):
        super().__init__()
        if not (type(count) is int and count >= 1):
            raise ValueError(f"Blocks got count={count}: give at least 1 block")
        self.norm, self.count, self.columns = norm, count, columns

    def lmo(self, gradient: Tensor) -> Tensor:
        return self._whole(self.norm.lmo(self._blocks(gradient)))

    def dual(self, gradient: Tensor) -> Tensor:
        return self.norm.dual(self._blocks(gradient)).sum(-1)

    def projected(self, wanted: Tensor) -> Tensor:
        return self._whole(self.norm.projected(self._blocks(wanted)))

    def init_(self, weight: Tensor, generator: Generator | None = None) -> Tensor:
        blocks = self.norm.init_(self._blocks(weight).contiguous(), generator)
        return weight.copy_(self._whole(blocks))

    def exact(self) -> Norm:
        return Blocks(self.norm.exact(), self.count, self.columns)

    def cost(self, d_out: int, d_in: int) -> int:
        rows, columns = (1, self.count) if self.columns else (self.count, 1)
        return self.count * self.norm.cost(d_out // rows, d_in // columns)

    def _blocks(self, matrices: Tensor) -> Tensor:
        """(..., m, n) -> (..., count, rows, columns)."""
        if self.columns:
            return matrices.unflatten(-1, (self.count, -1)).transpose(-3, -2)
        return matrices.unflatten(-2, (self.count, -1))

    def _whole(self, blocks: Tensor) -> Tensor:
        if self.columns:
            return blocks.transpose(-3, -2).flatten(-2)
        return blocks.flatten(-3, -2)


class AdaptiveRadius:
    """Gluon's layer-wise radius t_i = ||G_i||_* / (l0 + l1 ||G_i||_*) (arXiv:2505.13416).

    l0, l1: at least 0, not both 0. With l1 = 0 it is gamma ||G||_*, the step of the L-smooth
    theorem of arXiv:2510.00643, with gamma = 1 / l0.
    """

    def __init__(self, l0: float, l1: float):
        for name, value in {"l0": l0, "l1": l1}.items():
            if not (isinstance(value, Real) and isfinite(value) and value >= 0):
                raise ValueError(f"AdaptiveRadius got {name}={value}: give a number of at least 0")
        if l0 == l1 == 0:
            raise ValueError("AdaptiveRadius got l0=0 and l1=0: give one above 0")
        self.l0, self.l1 = float(l0), float(l1)

    def __call__(self, dual: Tensor) -> Tensor:
        """Dual norms (L,) of the layers -> radii (L,); 0 where the dual norm is 0."""
        return torch.where(dual > 0, dual / (self.l0 + self.l1 * dual), 0.0)

    def __repr__(self) -> str:
        return f"AdaptiveRadius(l0={self.l0:g}, l1={self.l1:g})"


def along(gradient: Tensor, direction: Tensor) -> Tensor:
    """The inner products (L,) of two batches of matrices (L, m, n)."""
    return torch.bmm(gradient.flatten(1)[:, None], direction.flatten(1)[..., None]).flatten()
