"""Gradients that are corrected for how far W has moved since the last step.

A running mean of gradients lags behind, since most of it belongs to earlier W. With an estimate d
of how far the gradient has moved since the last step, the momentum becomes

    M <- (1 - beta) (M + d) + beta grad f(W; xi)

with beta = 1 - momentum. This is the plain running mean of corrected gradients,
grad f(W; xi) + (1 - beta) / beta d, so compression, error feedback and all that follows treat a
corrected gradient like any other.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ef21_muon.checks.guards import GradientError

# The part of the way from W^k back to W^{k-1} over which gradients are differenced.
# (parameter, its W^{k-1} in float32, its momentum) per layer.
Layers: TypeAlias = Sequence[tuple[Tensor, Tensor, float]]
PARTS = {"mvr": 1.0, "hessian": 0.1}


def correction_of(kind: str, gamma: float, mesh: object | None) -> "Correction | None":
    """Return the correction for a kind of momentum, or None for "polyak".

    Args:
        kind: "polyak", "mvr" or "hessian".
        gamma: the factor of d, at least 0.
        mesh: the mesh of workers with several ranks, or None.

    Raises:
        ValueError: if a correction is wanted for workers of several ranks, which have only a part
            of W each.
    """
    if kind == "polyak":
        return None
    if mesh:
        raise ValueError(
            f"momentum_kind={kind!r} is not allowed with workers of several ranks, where each "
            "has a part of W: leave it at 'polyak', or give every worker one rank"
        )
    return Correction(kind, gamma)


class Correction:
    """The difference d between gradients of one batch at W^k and on the way back to W^{k-1}.

        "mvr"      d = grad f(W^k; xi^k) - grad f(W^{k-1}; xi^k)
        "hessian"  d = H f(W^k; xi^k) (W^k - W^{k-1})

    "hessian" is the difference of gradients over a tenth of the way, times 10: torch's fast
    attention has no second derivative, and differentiating the backward pass takes the memory of
    both passes. Both kinds evaluate every batch twice and keep W^{k-1}.

    Args:
        kind: "mvr" or "hessian".
        gamma: the factor of d, at least 0.

    Example:
        optimizer = EF21Muon(model, momentum_kind="mvr")
        loss = optimizer.step(closure)

    References:
        "mvr" is STORM's; for LMOs it is from arXiv:2512.16598. "hessian" is from arXiv:2512.13227.
    """

    def __init__(self, kind: str, gamma: float):
        self.kind, self.gamma = kind, gamma

    def corrected(
        self,
        closure: Callable | None,
        layers: Layers,
        bring: Callable,
        first: bool,
    ) -> Callable:
        """Return a closure that leaves corrected gradients and keeps W for the next step.

        Args:
            closure: clears the gradients, evaluates the batch, calls backward and returns the loss.
            layers: (parameter, its W^{k-1} in float32, its momentum) for every layer.
            bring: a function that checks the gradients, and raises GradientError if they do not
                allow a step.
            first: whether this is the first step, in which nothing is corrected.

        Raises:
            RuntimeError: if there is no closure.
        """
        if closure is None:
            raise RuntimeError(
                f"momentum_kind={self.kind!r} evaluates every batch twice: call step(closure) with "
                "a function that clears the gradients, evaluates the batch, calls backward and "
                "returns the loss"
            )

        def evaluate():
            loss = closure()
            try:
                bring()
            except GradientError:
                return loss  # the step will refuse these gradients
            models = [parameter.detach().clone() for parameter, _, _ in layers]
            if not first:
                self._correct(closure, layers, models, bring)
            for (_, before, _), model in zip(layers, models, strict=True):
                before.copy_(model)
            return loss

        return evaluate

    @torch.no_grad()
    def _correct(
        self, closure: Callable, layers: Layers, models: list[Tensor], bring: Callable
    ) -> None:
        """Evaluate the batch again on the way back to W^{k-1}, and correct the gradients."""
        part = PARTS[self.kind]
        gradients = [gradient.clone() for gradient in _gradients(layers)]
        # Writes to `.data` do not count as changes of a parameter from outside.
        for (parameter, before, _), model in zip(layers, models, strict=True):
            parameter.data.copy_(torch.lerp(model, before.to(model.dtype), part))
        try:
            with torch.enable_grad():
                closure()
            bring()
        finally:
            for (parameter, _, _), model in zip(layers, models, strict=True):
                parameter.data.copy_(model)
        others = _gradients(layers)
        for (parameter, _, momentum), gradient, other in zip(
            layers, gradients, others, strict=True
        ):
            d = (gradient - other.to(gradient.dtype)) / part
            weight = self.gamma * momentum / (1 - momentum)
            parameter.grad = torch.add(gradient, d, alpha=weight)


def _gradients(layers: Layers) -> list[Tensor]:
    """Return the gradients of layers; every layer has one."""
    return [parameter.grad for parameter, _, _ in layers if parameter.grad is not None]
