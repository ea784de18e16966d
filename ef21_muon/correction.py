"""Momentum that keeps up with W: gradients corrected for the way gone since the last step.

A running mean of gradients lags, since most of it is of earlier W. With an estimate d of how far
the gradient has moved from there,

    M <- (1 - beta) (M + d) + beta grad f(W; xi)

which is the plain mean of corrected gradients, grad f(W; xi) + (1 - beta) / beta d. So compression,
error feedback and everything else see a gradient like any other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ef21_muon.guards import GradientError

STEP = 0.1  # of the way from W^k back to W^{k-1}, over which a Hessian is differenced


class Correction:
    """d is the gradient at W^k less another one; a subclass says which, and of how much of the way.

    gamma: d is multiplied by it.
    """

    evaluates = True  # whether the gradient of the batch is taken at another W, too
    remembers = "previous_model"

    def __init__(self, gamma: float):
        self.gamma = gamma

    def place(self, model: Tensor, before: Tensor) -> Tensor:
        """Where the gradient is taken a second time, for W^k and W^{k-1}."""
        return before

    def moved(self, gradient: Tensor, other: Tensor) -> Tensor:
        """d from the gradient at W^k and the other one."""
        return gradient - other


class VarianceReduction(Correction):
    """d = grad f(W^k; xi^k) - grad f(W^{k-1}; xi^k): STORM's, for LMOs in arXiv:2512.16598.

    It takes a second gradient of the same batch, and keeps W^{k-1}.
    """


class ReusedGradient(Correction):
    """d = grad f(W^k; xi^k) - grad f(W^{k-1}; xi^{k-1}), with the gradient of the step before.

    No second gradient, but d has the noise of two batches: it takes a gamma far below 1
    (arXiv:2509.15816 has it as MVR1). It keeps the last gradient.
    """

    evaluates = False
    remembers = "previous_gradient"


class HessianCorrection(Correction):
    """d = H f(W^k; xi^k) (W^k - W^{k-1}), the Hessian-corrected momentum of arXiv:2512.13227.

    The product with the Hessian is a difference of gradients over a tenth of that way: torch's fast
    attention has no second derivative, and a second backward pass through the first takes the
    memory of both. It costs a second gradient of the batch, and keeps W^{k-1}.
    """

    def place(self, model: Tensor, before: Tensor) -> Tensor:
        return torch.lerp(model, before, STEP)

    def moved(self, gradient: Tensor, other: Tensor) -> Tensor:
        return super().moved(gradient, other) / STEP


KINDS = {"mvr": VarianceReduction, "mvr1": ReusedGradient, "hessian": HessianCorrection}


def no_closure() -> None:
    """For gradients that are there already."""


def corrected(
    correction: Correction,
    layers: list[tuple[Tensor, Tensor, float]],
    closure: Callable,
    bring: Callable,
    first: bool,
) -> Callable:
    """A closure that leaves corrected gradients, and remembers what the next step needs.

    layers: of every parameter what is remembered of the step before, float32 of its shape, and
    beta; bring: raises GradientError for gradients with which there is no step. In the `first` step
    nothing is remembered, and nothing is corrected.
    """

    def evaluate():
        loss = closure()
        try:
            bring()
        except GradientError:
            return loss  # for the step to refuse
        with torch.no_grad():
            models = [parameter.clone() for parameter, _, _ in layers]
            gradients = [parameter.grad.clone() for parameter, _, _ in layers]
            if not first:
                others = [before for _, before, _ in layers]
                if correction.evaluates:
                    others = _gradients_elsewhere(correction, layers, models, closure, bring)
                for (parameter, _, beta), gradient, other in zip(
                    layers, gradients, others, strict=True
                ):
                    d = correction.moved(gradient, other.to(gradient.dtype))
                    weight = correction.gamma * (1 - beta) / beta
                    parameter.grad = torch.add(gradient, d, alpha=weight)
            remembered = models if correction.evaluates else gradients
            for (_, before, _), now in zip(layers, remembered, strict=True):
                before.copy_(now)
        return loss

    return evaluate


def _gradients_elsewhere(
    correction: Correction,
    layers: list[tuple[Tensor, Tensor, float]],
    models: list[Tensor],
    closure: Callable,
    bring: Callable,
) -> list[Tensor]:
    """Of the same batch, at the correction's place; the parameters are then what they were."""
    # `.data`, so that a parameter does not count as changed from outside.
    for (parameter, before, _), model in zip(layers, models, strict=True):
        parameter.data.copy_(correction.place(model, before.to(model.dtype)))
    try:
        with torch.enable_grad():
            closure()
        bring()
        return [parameter.grad for parameter, _, _ in layers]
    finally:
        for (parameter, _, _), model in zip(layers, models, strict=True):
            parameter.data.copy_(model)
