"""The base class of norms, which give the server's step its geometry.

A norm has a linear minimisation oracle (LMO), `lmo(G)`, the minimiser of <G, Z> over the unit ball,
and a dual norm, `dual(G)`, so that <G, lmo(G)> = -dual(G). Both take batches of matrices
(..., d_out, d_in), stored as torch.nn.Linear stores its weight; a vector of n entries is (n, 1).
"""

from inspect import signature
from typing import ClassVar

import torch
from torch import Generator, Tensor


class Norm:
    """The base class of norms on matrices of d_out rows and d_in columns.

    Subclasses implement `aligned` and `dual_norm` for the unscaled norm, s = 1. They set
    `cost_per_entry`, the multiplications of the LMO per entry, or override `cost`.

    Args:
        scaling: a key of the class attribute `scalings`, a dictionary of functions s(d_out, d_in).
            The norm is divided by s, so `lmo` and `dual` are s times as large. The default is the
            first key; "none" is s = 1.

    Raises:
        ValueError: if `scaling` is not a key of `scalings`.

    Example:
        >>> class Largest(Norm):  # max |Z_ij|, as Sign("none")
        ...     def aligned(self, gradient):
        ...         return gradient.sign()
        ...     def dual_norm(self, gradient):
        ...         return gradient.abs().sum((-2, -1))
        >>> Largest().lmo(torch.tensor([[3.0, -4.0]]))
        tensor([[-1.,  1.]])
    """

    scalings: ClassVar = {"none": lambda d_out, d_in: 1.0}
    cost_per_entry = 3

    def __init__(self, scaling: str | None = None):
        self.scaling = next(iter(self.scalings)) if scaling is None else scaling
        if self.scaling not in self.scalings:
            known = ", ".join(self.scalings)
            raise ValueError(f"{type(self).__name__} got scaling={scaling!r}: choose {known}")

    def aligned(self, gradient: Tensor) -> Tensor:
        """Return the maximiser of <gradient, Z> over ||Z|| <= 1 for s = 1, a new tensor.

        Subclasses implement it for gradients (..., d_out, d_in).
        """
        raise NotImplementedError

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """Return the dual norm for s = 1, (...) for a gradient (..., d_out, d_in).

        Subclasses implement it.
        """
        raise NotImplementedError

    def lmo(self, gradient: Tensor) -> Tensor:
        """Return the linear minimisation oracle, argmin of <gradient, Z> over ||Z|| <= 1.

        Args:
            gradient: matrices (..., d_out, d_in), floating point.

        Returns:
            A new tensor of the shape of `gradient`; zero where the whole matrix is zero.
        """
        return self.aligned(gradient).mul_(-self.scale(*gradient.shape[-2:]))

    def dual(self, gradient: Tensor) -> Tensor:
        """Return the dual norm, the maximum of <gradient, Z> over ||Z|| <= 1.

        Args:
            gradient: matrices (..., d_out, d_in), floating point.

        Returns:
            A tensor (...), one number per matrix.
        """
        return self.dual_norm(gradient) * self.scale(*gradient.shape[-2:])

    def projected(self, wanted: Tensor) -> Tensor:
        """Return the projection of -wanted on the direction of the LMO.

        With Z = lmo(wanted) it is -(<wanted, Z> / ||Z||_F^2) Z, or zero where Z is zero.

        Args:
            wanted: matrices (..., d_out, d_in), floating point.

        Returns:
            A new tensor of the shape of `wanted`.

        References:
            EF-Muon (arXiv:2605.08980).
        """
        direction = self.lmo(wanted)
        along = (wanted * direction).sum((-2, -1), keepdim=True)
        squared = direction.square().sum((-2, -1), keepdim=True)
        return direction.mul_(torch.where(squared > 0, -along / squared, 0.0))

    @torch.no_grad()
    def init_(self, weight: Tensor, generator: Generator | None = None) -> Tensor:
        """Fill a weight with random extreme points of the unit ball, in place.

        They are minus the exact LMO of Gaussian matrices. Scion starts from these points times the
        radius, with scaling="scion", but starts biases from zero.

        Args:
            weight: the tensor (..., d_out, d_in) to fill.
            generator: the source of the Gaussian numbers, on the weight's device; default None,
                which is torch's global generator.

        Returns:
            `weight`.

        References:
            Pethick et al., Scion (arXiv:2502.07529).
        """
        gaussian = torch.randn(
            weight.shape, generator=generator, dtype=torch.float32, device=weight.device
        )
        return weight.copy_(self.exact().lmo(gaussian).neg_())

    def exact(self) -> "Norm":
        """Return this norm with an LMO that is exact up to rounding."""
        return self

    def cost(self, d_out: int, d_in: int) -> int:
        """Return the number of multiplications that `lmo` takes for one d_out x d_in matrix.

        The assignment of layers to owner ranks balances these costs.
        """
        return self.cost_per_entry * d_out * d_in

    def scale(self, d_out: int, d_in: int) -> float:
        """Return s(d_out, d_in), the factor by which `lmo` and `dual` are scaled."""
        return self.scalings[self.scaling](d_out, d_in)

    def __repr__(self) -> str:
        """Return the constructor call, without arguments that have their defaults."""
        given = []
        for name, parameter in signature(type(self)).parameters.items():
            default = next(iter(self.scalings)) if name == "scaling" else parameter.default
            if (value := getattr(self, name, default)) != default:
                given.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"
