"""The gradients that a worker brings to a step: missing ones are zero, or refused by name."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ef21_muon.exchange.shards import is_sharded


class GradientError(RuntimeError, ValueError):
    """A gradient is missing or does not fit its parameter."""


class Layer(NamedTuple):
    """A parameter of `entries` entries, and whether a missing gradient of it is "zero".

    Or "refuse", or "skip": then what there is of it is somebody else's business.
    """

    name: str
    parameter: Tensor
    entries: int
    missing: str


def bring_gradients(layers: Sequence[Layer], optimizer: str) -> None:
    """Put zeros in place of missing gradients where that was asked for.

    Raises GradientError before anything changes, since other workers would wait for the message,
    for a gradient that is missing otherwise or does not fit, and where all are missing.
    """
    for layer in layers:
        if layer.missing != "skip":
            _require_fit(layer, optimizer)
    missing = [layer for layer in layers if layer.parameter.grad is None]
    zero = [layer.parameter for layer in missing if layer.missing == "zero"]
    if zero and len(missing) == len(layers):
        raise GradientError(
            f"none of the parameters of {optimizer} has a gradient, {layers[0].name} the first: "
            f"missing='zero' is for some of them; {_how_to_bring(layers[0])}, or give zeros for a "
            "batch that reaches none"
        )
    for parameter in zero:
        parameter.grad = torch.zeros_like(parameter)


def _require_fit(layer: Layer, optimizer: str) -> None:
    name, parameter, gradient = layer.name, layer.parameter, layer.parameter.grad
    if gradient is None:
        if layer.missing == "zero":
            return
        raise GradientError(
            f"{name} has no gradient: every parameter given to {optimizer} takes part in every "
            f"step; {_how_to_bring(layer)}, leave out those that the loss does not reach (EF21Muon "
            "and AveragedGradients take missing='zero' for those that it reaches at times)"
        )
    if gradient.layout != torch.strided:
        raise GradientError(
            f"the gradient of {name} is sparse ({gradient.layout}): {optimizer} takes whole ones; "
            "build its module with sparse=False, or leave it to another optimizer"
        )
    fits = gradient.shape == parameter.shape and gradient.numel() == layer.entries
    if not (fits and gradient.is_floating_point()):
        raise GradientError(
            f"the gradient of {name} has shape {tuple(gradient.shape)} and type {gradient.dtype}: "
            "give floating-point numbers, and the shape that the parameter had when "
            f"{optimizer} was built"
        )


def _how_to_bring(layer: Layer) -> str:
    if is_sharded(layer.parameter):
        return "call set_requires_gradient_sync(True) before the last loss.backward() of a step"
    return "call loss.backward() before step()"
