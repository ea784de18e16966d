"""Norms: the geometry of the server's step.

A norm gives `lmo(G)`, the minimiser of <G, Z> over its unit ball, and `dual(G)`, its dual norm, so
that <G, lmo(G)> = -dual(G). All take batches of matrices (..., d_out, d_in), as torch.nn.Linear
stores its weight; the optimizer passes a vector of n entries as an (n, 1) matrix.
"""

from math import isfinite

import torch
from torch import Tensor

from ef21_muon.newton_schulz import newton_schulz


class Norm:
    """A norm on matrices of d_out rows and d_in columns."""

    def lmo(self, gradient: Tensor) -> Tensor:
        """argmin of <gradient, Z> over ||Z|| <= 1. (..., d_out, d_in) -> the same shape."""
        raise NotImplementedError

    def dual(self, gradient: Tensor) -> Tensor:
        """The dual norm. (..., d_out, d_in) -> (...)."""
        raise NotImplementedError

    def cost(self, d_out: int, d_in: int) -> int:
        """Multiplications that `lmo` takes for one matrix, for balancing servers."""
        raise NotImplementedError


class Spectral(Norm):
    """||Z|| = sqrt(d_in/d_out) sigma_max(Z), the RMS -> RMS operator norm.

    lmo(U S V^T) = -sqrt(d_out/d_in) U V^T, by Newton-Schulz: singular values, and with them the
    norm, lie in a band around the exact one (see `newton_schulz`). The dual norm is
    sqrt(d_out/d_in) times the nuclear norm, exactly. Scaling as in Scion (arXiv:2502.07529). For a
    vector as (n, 1) it is the RMS norm, lmo(b) = -sqrt(n) b / ||b||.
    """

    def __init__(self, steps: int = 5):
        if steps < 1:
            raise ValueError(f"Spectral got steps={steps}: give at least 1 Newton-Schulz step")
        self.steps = steps

    def lmo(self, gradient: Tensor) -> Tensor:
        return newton_schulz(gradient, self.steps).mul_(-self._scale(*gradient.shape[-2:]))

    def dual(self, gradient: Tensor) -> Tensor:
        return self._scale(*gradient.shape[-2:]) * torch.linalg.svdvals(gradient).sum(-1)

    def cost(self, d_out: int, d_in: int) -> int:
        short, long = sorted((d_out, d_in))
        return self.steps * short * short * (2 * long + short)

    @staticmethod
    def _scale(d_out: int, d_in: int) -> float:
        return (d_out / d_in) ** 0.5


class Sign(Norm):
    """||Z|| = d_in max |Z_ij|; lmo(G) = -sign(G) / d_in; the dual is sum |G_ij| / d_in.

    Scion's choice for the (tied) head (arXiv:2502.07529).
    """

    def lmo(self, gradient: Tensor) -> Tensor:
        return gradient.sign().div_(-gradient.shape[-1])

    def dual(self, gradient: Tensor) -> Tensor:
        return gradient.abs().sum((-2, -1)) / gradient.shape[-1]

    def cost(self, d_out: int, d_in: int) -> int:
        return d_out * d_in


class AdaptiveRadius:
    """Gluon's layer-wise radius t_i = ||G_i||_* / (l0 + l1 ||G_i||_*) (arXiv:2505.13416).

    l0, l1: at least 0, not both 0; ValueError otherwise. With l1 = 0 it is the step of the L-smooth
    theorem of arXiv:2510.00643, gamma ||G||_* with gamma = 1 / l0.
    """

    def __init__(self, l0: float, l1: float):
        for name, value in (("l0", l0), ("l1", l1)):
            if not (isinstance(value, float | int) and isfinite(value) and value >= 0):
                raise ValueError(f"AdaptiveRadius got {name}={value}: give a number of at least 0")
        if l0 == l1 == 0:
            raise ValueError("AdaptiveRadius got l0=0 and l1=0: give one above 0")
        self.l0, self.l1 = l0, l1

    def __call__(self, dual: Tensor) -> Tensor:
        """Dual norms (L,) of the layers -> radii (L,); 0 where the dual norm is 0."""
        return torch.where(dual > 0, dual / (self.l0 + self.l1 * dual), 0.0)

    def __repr__(self) -> str:
        return f"AdaptiveRadius(l0={self.l0:g}, l1={self.l1:g})"
