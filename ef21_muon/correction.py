"""Momentum that keeps up with W: gradients corrected for the way gone since the last step.

A running mean of gradients lags, since most of it is of earlier W. With an estimate d of how far
the gradient has moved from there,

    M <- (1 - beta) (M + d) + beta grad f(W; xi)

which is the plain mean of corrected gradients, grad f(W; xi) + (1 - beta) / beta d. So compression,
error feedback and everything else see a gradient like any other.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ef21_muon.guards import GradientError

# The part of the way from W^k back to W^{k-1} over which gradients are differenced.
PARTS = {"mvr": 1.0, "hessian": 0.1}


def correction_of(kind: str, gamma: float, mesh: object | None) -> "Correction | None":
    """The correction of a kind of momentum; None for "polyak".

    Raises:
        ValueError: for workers of several ranks, each of which has a part of W.
    """
    if kind == "polyak":
        return None
    if mesh:
        raise ValueError(
            f"momentum_kind={kind!r} is not allowed with workers of several ranks, of which each "
            "has a part of W: leave it at 'polyak', or give every worker one rank"
        )
    return Correction(kind, gamma)


class Correction:
    """d by gradients of one batch at W^k and on the way back to W^{k-1}.

    "mvr": d = grad f(W^k; xi^k) - grad f(W^{k-1}; xi^k), STORM's, for LMOs in arXiv:2512.16598.

    "hessian": d = H f(W^k; xi^k) (W^k - W^{k-1}) of arXiv:2512.13227, differenced over a tenth of
    that way: torch's fast attention has no second derivative, and a second backward pass through
    the first takes the memory of both.

    Both take a second gradient of the batch, and keep W^{k-1}. gamma: d is multiplied by it.
    """

    def __init__(self, kind: str, gamma: float):
        self.kind, self.gamma = kind, gamma

    def corrected(
        self,
        closure: Callable | None,
        layers: Sequence[tuple[Tensor, Tensor, float]],
        bring: Callable,
        first: bool,
    ) -> Callable:
        """A closure that leaves corrected gradients, and remembers W for the next step.

        layers: every parameter, its W^{k-1} in float32, and momentum; bring: raises GradientError for
        gradients with which there is no step. In the `first` step nothing is corrected. Raises
        RuntimeError without a closure.
        """
        if closure is None:
            raise RuntimeError(
                f"momentum_kind={self.kind!r} evaluates every batch twice: call step(closure) with a "
                "function that clears the gradients, evaluates the batch, calls backward and "
                "returns the loss"
            )

        def evaluate():
            loss = closure()
            try:
                bring()
            except GradientError:
                return loss  # for the step to refuse
            models = [parameter.detach().clone() for parameter, _, _ in layers]
            if not first:
                self._correct(closure, layers, models, bring)
            for (_, before, _), model in zip(layers, models, strict=True):
                before.copy_(model)
            return loss

        return evaluate

    @torch.no_grad()
    def _correct(self, closure: Callable, layers, models: list[Tensor], bring: Callable) -> None:
        part = PARTS[self.kind]
        gradients = [parameter.grad.clone() for parameter, _, _ in layers]
        # `.data`, so that a parameter does not count as changed from outside.
        for (parameter, before, _), model in zip(layers, models, strict=True):
            parameter.data.copy_(torch.lerp(model, before.to(model.dtype), part))
        try:
            with torch.enable_grad():
                closure()
            bring()
        finally:
            for (parameter, _, _), model in zip(layers, models, strict=True):
                parameter.data.copy_(model)
        for (parameter, _, momentum), gradient in zip(layers, gradients, strict=True):
            d = (gradient - parameter.grad.to(gradient.dtype)) / part
            weight = self.gamma * momentum / (1 - momentum)
            parameter.grad = torch.add(gradient, d, alpha=weight)
