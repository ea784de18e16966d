"""Clipping of gradients that several ranks hold."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ef21_muon.transport.fixed import ALONE, Group, place_in


def clip(gradients: Sequence[Tensor], max_norm: float, group: Group = ALONE) -> None:
    """Scale gradients in place, so that their joint Euclidean norm is at most `max_norm`.

    As torch.nn.utils.clip_grad_norm_, except that a norm which is not finite changes nothing, so
    that the layer it comes from can be named. Does not wait for the device.

    Args:
        gradients: all on one device.
        max_norm: above 0.
        group: the ranks that hold the worker's other gradients; to be called on all of them.
    """
    gradients = list(gradients)
    square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    if group != ALONE and place_in(group)[1] > 1:
        dist.all_reduce(square, group=group)
    norm = square.sqrt()
    scale = torch.where(norm.isfinite(), max_norm / (norm + 1e-6), 1.0).clamp_(max=1.0)
    torch._foreach_mul_(gradients, scale.float())
