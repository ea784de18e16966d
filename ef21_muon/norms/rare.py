"""Norms whose LMO is a single pair of singular vectors or a single entry."""

import torch
from torch import Tensor

from ef21_muon.norms.base import Norm
from ef21_muon.norms.newton_schulz import unit_length


class Nuclear(Norm):
    """The nuclear norm, the sum of singular values, whose LMO has rank one.

        lmo(G) = -u v^T for the largest singular value,    dual(G) = sigma_max(G)

    `lmo` finds u by squaring the Gram matrix of the shorter side `SQUARINGS` = 16 times, which is
    as good as 2^16 power iterations: <G, lmo(G)> is within 1e-4 sigma_max(G) of the minimum. Unlike
    an eigensolver this never waits for the device and does not raise for NaN.

    Args:
        scaling: "none" (default), the only choice.

    Raises:
        ValueError: if `scaling` is anything else.

    Example:
        >>> torch.linalg.matrix_rank(Nuclear().lmo(torch.tensor([[2.0, 0.0], [0.0, 1.0]])))
        tensor(1)
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
    """The sum of magnitudes sum |Z_ij|, whose LMO is greedy coordinate descent.

        lmo(G)_ij = -sign(G_ij) at one entry of largest magnitude and 0 elsewhere,
        dual(G) = max |G_ij|

    Args:
        scaling: "none" (default), the only choice.

    Raises:
        ValueError: if `scaling` is anything else.

    Example:
        >>> L1().lmo(torch.tensor([[3.0, -4.0]]))
        tensor([[-0., 1.]])
    """

    cost_per_entry = 1

    def aligned(self, gradient: Tensor) -> Tensor:
        entries = gradient.flatten(-2)
        place = entries.abs().argmax(-1, keepdim=True)
        sign = entries.gather(-1, place).sign()
        return torch.zeros_like(entries).scatter_(-1, place, sign).view(gradient.shape)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return gradient.abs().amax((-2, -1))
