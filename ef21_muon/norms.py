"""Norms: the geometry of the server's step.

A norm gives `lmo(G)`, the minimiser of <G, Z> over its unit ball, and `dual(G)`, its dual norm, so
that <G, lmo(G)> = -dual(G). All take batches of matrices (..., d_out, d_in), as torch.nn.Linear
stores its weight; the optimizer passes a vector of n entries as an (n, 1) matrix.
"""

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
