"""The base class of norms: the geometry of the server's step."""

from inspect import signature
from typing import ClassVar

import torch
from torch import Generator, Tensor


class Norm:
    """A norm on matrices of d_out rows and d_in columns.

    scaling: a name in `scalings`, by default the first. For s = 1 a norm of your own has
    `aligned(G)`, a new tensor with the maximiser of <G, Z> over the unit ball, and `dual_norm(G)`;
    and `cost` if it is not `cost_per_entry` times the entries.
    """

    scalings: ClassVar = {"none": lambda d_out, d_in: 1.0}
    cost_per_entry = 3

    def __init__(self, scaling: str | None = None):
        self.scaling = next(iter(self.scalings)) if scaling is None else scaling
        if self.scaling not in self.scalings:
            known = ", ".join(self.scalings)
            raise ValueError(f"{type(self).__name__} got scaling={scaling!r}: choose {known}")

    def lmo(self, gradient: Tensor) -> Tensor:
        """argmin of <gradient, Z> over ||Z|| <= 1; zero where the gradient is."""
        return self.aligned(gradient).mul_(-self.scale(*gradient.shape[-2:]))

    def dual(self, gradient: Tensor) -> Tensor:
        """The dual norm. (..., d_out, d_in) -> (...)."""
        return self.dual_norm(gradient) * self.scale(*gradient.shape[-2:])

    def projected(self, wanted: Tensor) -> Tensor:
        """The part of -wanted along the LMO's direction Z: -(<wanted, Z> / ||Z||_2^2) Z or zero."""
        direction = self.lmo(wanted)
        along = (wanted * direction).sum((-2, -1), keepdim=True)
        squared = direction.square().sum((-2, -1), keepdim=True)
        return direction.mul_(torch.where(squared > 0, -along / squared, 0.0))

    @torch.no_grad()
    def init_(self, weight: Tensor, generator: Generator | None = None) -> Tensor:
        """Fill weight (..., d_out, d_in) with random extreme points of the unit ball; returns it.

        They are minus the exact LMO of Gaussian matrices. With scaling="scion" Scion
        (arXiv:2502.07529) starts from them, times the radius, but biases from zero.
        """
        like = {"dtype": torch.float32, "device": weight.device}
        gaussian = torch.randn(weight.shape, generator=generator, **like)
        return weight.copy_(self.exact().lmo(gaussian).neg_())

    def exact(self) -> "Norm":
        """This norm with an LMO that is exact up to rounding."""
        return self

    def cost(self, d_out: int, d_in: int) -> int:
        """Multiplications that `lmo` takes for one matrix, for balancing servers."""
        return self.cost_per_entry * d_out * d_in

    def scale(self, d_out: int, d_in: int) -> float:
        return self.scalings[self.scaling](d_out, d_in)

    def __repr__(self) -> str:
        """The call that builds it, defaults left out."""
        given = []
        for name, parameter in signature(type(self)).parameters.items():
            default = next(iter(self.scalings)) if name == "scaling" else parameter.default
            if (value := getattr(self, name, default)) != default:
                given.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"
