"""Line 3 of Algorithm 1: the step of a layer from its gradient estimate, by its group's rule."""

from math import sqrt

import torch
from torch import Tensor

from ef21_muon.norms.lmo import AdaptiveRadius, along


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
