"""Norms, their linear minimisation oracles (LMOs) and duals, and the adaptive radius.

Docstrings give formulas for the unscaled norm, s = 1 (`Norm`). G is a gradient and Z a point of the
unit ball, both d_out x d_in.
"""

from math import isfinite, sqrt
from numbers import Real
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ef21_muon.norms.base import Norm
from ef21_muon.norms.newton_schulz import POLYNOMIALS, length, newton_schulz, unit_length


class Spectral(Norm):
    """The spectral norm sigma_max(Z), whose LMO is the step of Muon.

        lmo(U S V^T) = -U V^T,    dual(G) = sum of the singular values of G (the nuclear norm)

    The dual is always exact. The LMO is approximate, with a spectral norm near 1, unless
    method="svd".

    Args:
        method: how U V^T is computed. "jordan" (default) and "polar_express" are Newton-Schulz
            iterations (`ef21_muon.norms.newton_schulz`); "svd" is exact and slow.
        steps: the number of Newton-Schulz iterations, at least 1; default 5.
        scaling: by which s(d_out, d_in) the norm is divided. "scion" (default) is
            sqrt(d_out / d_in), which gives the RMS -> RMS operator norm, and for vectors the RMS
            norm. "muon" is sqrt(max(1, d_out / d_in)) and "moonlight" is
            0.2 sqrt(max(d_out, d_in)), for steps whose RMS is 0.2; torch.optim.Muon calls these
            two "original" and "match_rms_adamw". "none" is 1.
        dtype: the dtype of the Newton-Schulz iteration: torch.bfloat16, torch.float32 or
            torch.float64. None (default) is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: if an argument is not among the values above.

    Example:
        >>> step = Spectral("svd", scaling="none").lmo(torch.randn(3, 8))
        >>> torch.linalg.svdvals(step).round(decimals=3)
        tensor([1., 1., 1.])

    References:
        Jordan et al., Muon (2024). Pethick et al., Scion (arXiv:2502.07529). Liu et al.,
        Moonlight (arXiv:2502.16982). Gruntkowska et al. (arXiv:2510.00643), Algorithm 1, line 3.
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
        kept = values > rounding * values[..., :1]  # the others are zero up to rounding
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
    """The largest magnitude max |Z_ij|, which is the 1 -> infinity operator norm.

        lmo(G) = -sign(G),    dual(G) = sum |G_ij|

    Args:
        scaling: by which s(d_out, d_in) the norm is divided. "scion" (default) is 1 / d_in,
            Scion's choice for the head, tied or not; "none" is 1.

    Raises:
        ValueError: if `scaling` is neither.

    Example:
        >>> Sign().lmo(torch.tensor([[3.0, -4.0]]))
        tensor([[-0.5000,  0.5000]])

    References:
        Pethick et al., Scion (arXiv:2502.07529).
    """

    scalings: ClassVar = {"scion": lambda d_out, d_in: 1 / d_in, **Norm.scalings}
    cost_per_entry = 1

    def aligned(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return gradient.abs().sum((-2, -1))


class ColumnNorm(Norm):
    """The largest 2-norm of a column, max_j ||Z_:j||.

        lmo(G)_:j = -G_:j / ||G_:j||,    dual(G) = sum_j ||G_:j||

    A torch.nn.Embedding stores the columns of an input layer as rows: use RowNorm("none") with the
    radius sqrt(d_in) for it.

    Args:
        scaling: by which s(d_out, d_in) the norm is divided. "scion" (default) is sqrt(d_out),
            which gives the 1 -> RMS operator norm, Scion's choice for the input layer; "none" is 1.

    Raises:
        ValueError: if `scaling` is neither.

    Example:
        >>> ColumnNorm("none").lmo(torch.tensor([[3.0, 0.0], [4.0, -2.0]]))
        tensor([[-0.6000, -0.0000],
                [-0.8000,  1.0000]])

    References:
        Pethick et al., Scion (arXiv:2502.07529).
    """

    scalings: ClassVar = {"scion": lambda d_out, d_in: sqrt(d_out), **Norm.scalings}

    def aligned(self, gradient: Tensor) -> Tensor:
        return unit_length(gradient, -2)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return length(gradient, -2).sum(-1)


class RowNorm(Norm):
    """The largest 2-norm of a row, max_i ||Z_i:||.

        lmo(G)_i: = -G_i: / ||G_i:||,    dual(G) = sum_i ||G_i:||

    Args:
        scaling: by which s(d_out, d_in) the norm is divided. "scion" (default) is
            1 / sqrt(d_in), which gives the RMS -> infinity operator norm, Scion's choice for the
            output layer; "none" is 1.

    Raises:
        ValueError: if `scaling` is neither.

    Example:
        >>> RowNorm("none").lmo(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
        tensor([[-0.6000, -0.8000],
                [-0.0000,  1.0000]])

    References:
        Pethick et al., Scion (arXiv:2502.07529).
    """

    scalings: ClassVar = {"scion": lambda d_out, d_in: 1 / sqrt(d_in), **Norm.scalings}

    def aligned(self, gradient: Tensor) -> Tensor:
        return unit_length(gradient, -1)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return length(gradient, -1).sum(-1)


class Euclidean(Norm):
    """The Frobenius norm ||Z||_F, whose LMO is normalised gradient descent.

        lmo(G) = -G / ||G||_F,    dual(G) = ||G||_F

    With the radius AdaptiveRadius(l0=1/gamma, l1=0) the step is -gamma G, plain gradient descent.

    Args:
        scaling: "none" (default), the only choice.

    Raises:
        ValueError: if `scaling` is anything else.

    Example:
        >>> Euclidean().lmo(torch.tensor([[3.0, -4.0]]))
        tensor([[-0.6000,  0.8000]])
    """

    def aligned(self, gradient: Tensor) -> Tensor:
        return unit_length(gradient)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return length(gradient)


class BiasRMS(Euclidean):
    """The RMS norm ||z|| / sqrt(n) of n entries, Scion's choice for biases.

        lmo(g) = -sqrt(n) g / ||g||,    dual(g) = sqrt(n) ||g||

    Args:
        scaling: "scion" (default), the only choice: s = sqrt(d_out d_in) = sqrt(n).

    Raises:
        ValueError: if `scaling` is anything else.

    Example:
        >>> BiasRMS().lmo(torch.tensor([[2.0], [0.0]]))
        tensor([[-1.4142],
                [-0.0000]])

    References:
        Pethick et al., Scion (arXiv:2502.07529).
    """

    scalings: ClassVar = {"scion": lambda d_out, d_in: sqrt(d_out * d_in)}


class Blocks(Norm):
    """The largest norm of a block, max_b norm(Z_b), for a matrix that is made of several maps.

        lmo(G)_b = norm.lmo(G_b),    dual(G) = sum_b norm.dual(G_b)

    The blocks are parts of a linear map that have inputs and outputs of their own, such as the
    groups of a grouped convolution.

    Args:
        norm: the norm of each block.
        count: the number of equal blocks, at least 1; it has to divide the side that is cut.
        columns: whether the blocks lie side by side; False (default) if they lie below each other.

    Raises:
        ValueError: if `count` is not a whole number above 0.

    Example:
        >>> Blocks(Euclidean(), 2).lmo(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
        tensor([[-0.6000, -0.8000],
                [-0.0000,  1.0000]])
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
        """(..., count, rows, columns) -> (..., m, n)."""
        if self.columns:
            return blocks.transpose(-3, -2).flatten(-2)
        return blocks.flatten(-3, -2)


class AdaptiveRadius:
    """A radius for each layer that follows the dual norm of its gradient, as in Gluon.

        t_i = ||G_i||_* / (l0 + l1 ||G_i||_*)

    With l1 = 0 it is gamma ||G_i||_* with gamma = 1 / l0, the step of the theorem for L-smooth
    functions in the EF21-Muon paper. Give it in place of a number: radius=AdaptiveRadius(...).

    Args:
        l0: the constant L0 of (L0, L1)-smoothness, at least 0.
        l1: the constant L1, at least 0; one of the two is above 0.

    Raises:
        ValueError: if a constant is negative or not a finite number, or if both are 0.

    Example:
        >>> AdaptiveRadius(l0=1.0, l1=0.5)(torch.tensor([0.0, 2.0]))
        tensor([0., 1.])

    References:
        Riabinin et al., Gluon (arXiv:2505.13416). Gruntkowska et al. (arXiv:2510.00643).
    """

    def __init__(self, l0: float, l1: float):
        for name, value in {"l0": l0, "l1": l1}.items():
            if not (isinstance(value, Real) and isfinite(value) and value >= 0):
                raise ValueError(f"AdaptiveRadius got {name}={value}: give a number of at least 0")
        if l0 == l1 == 0:
            raise ValueError("AdaptiveRadius got l0=0 and l1=0: give one above 0")
        self.l0, self.l1 = float(l0), float(l1)

    def __call__(self, dual: Tensor) -> Tensor:
        """Return the radii of layers.

        Args:
            dual: the dual norms (L,) of the layers.

        Returns:
            The radii (L,); 0 where the dual norm is 0.
        """
        return torch.where(dual > 0, dual / (self.l0 + self.l1 * dual), 0.0)

    def __repr__(self) -> str:
        return f"AdaptiveRadius(l0={self.l0:g}, l1={self.l1:g})"


def along(gradient: Tensor, direction: Tensor) -> Tensor:
    """Return the inner products (L,) of two batches of matrices (L, m, n)."""
    return torch.bmm(gradient.flatten(1)[:, None], direction.flatten(1)[..., None]).flatten()


def scale_step(
    group: dict, lr: float | Tensor, gradient: Tensor, step: Tensor, kernel: int = 1
) -> Tensor:
    """Give a step, in place, its length: lr radius LMO(G), whatever the gradient's length.

    Args:
        group: parameter group with radius and conv_scaling.
        lr: number, or scalar on the gradients' device.
        gradient: G of the layers, float32 (L, m, n).
        step: LMO(G), float32 (L, m, n).
        kernel: entries of a convolution's kernel, by whose root conv_scaling divides.
    """
    if group["conv_scaling"]:
        step /= sqrt(kernel)
    if not isinstance(group["radius"], AdaptiveRadius):
        return step.mul_(lr * group["radius"])
    dual = -along(gradient, step)  # of an exact LMO, the dual norm
    return step.mul_(group["radius"](dual)[:, None, None]).mul_(lr)


def step_with_feedback(group: dict, lr: float | Tensor, gradient: Tensor, error: Tensor) -> Tensor:
    """EF-Muon: d = e + lr radius G; the step is the part of -d along LMO(d); e becomes d + step.

    Args:
        group: parameter group with norm and radius.
        lr: number, or scalar on the gradients' device.
        gradient: G of the layers, float32 (L, m, n).
        error: e, float32 (L, m, n), changed in place.

    Returns:
        The steps, float32 (L, m, n).

    References:
        arXiv:2605.08980.
    """
    error += lr * group["radius"] * gradient  # not fused, as some processors would
    step = group["norm"].projected(error)
    error += step
    return step


def lr_of(group: dict, device: torch.device) -> float | Tensor:
    """The lr as a factor that the host does not wait for: a number, or a scalar on the device."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    on_device = lr.device == device and device.type != "cpu"
    return lr.reshape(()) if on_device else lr.item()
