"""What is asked of an optimizer that another one is around."""

from collections.abc import Sequence
from inspect import Parameter, signature

from torch import Tensor
from torch.optim import Optimizer

from ef21_muon.communicating import CommunicatingOptimizer
from ef21_muon.exchange.collectives import place_in


def require_inner(optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for what cannot step by itself."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer) or hasattr(optimizer, "inner"):
            raise ValueError(
                f"inner={type(optimizer).__name__} is not allowed: give a torch optimizer, which "
                "takes the steps"
            )
        sends = isinstance(optimizer, CommunicatingOptimizer)
        if sends and place_in(optimizer.process_group)[1] > 1:
            raise ValueError(
                f"inner={type(optimizer).__name__} sends messages itself: build it with "
                "process_group=ALONE (from ef21_muon import ALONE)"
            )
        correction = getattr(optimizer, "correction", None)
        if correction is not None and correction.evaluates:
            raise ValueError(
                f"inner={type(optimizer).__name__} with momentum={optimizer.momentum!r} needs a "
                "closure in every step: give momentum='polyak' or 'mvr1'"
            )
        closure = signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is Parameter.empty:
            raise ValueError(
                f"inner={type(optimizer).__name__} needs a closure in every step: give an "
                "optimizer that steps on gradients"
            )


def require_a_gradient(groups: list[dict]) -> None:
    """Raise RuntimeError if no parameter has one: the optimizer may be of another model's."""
    if all(parameter.grad is None for group in groups for parameter in group["params"]):
        raise RuntimeError(
            "none of the inner optimizer's parameters has a gradient: build it from the parameters "
            "of the model whose loss.backward() is called, and after moving it to its device"
        )


def require_float_state(optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for inner state that a checkpoint could not hold exactly as tensors."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for key, value in state.items():
                if not (isinstance(value, Tensor) and value.is_floating_point()):
                    told = value.dtype if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(
                        f"the state {key!r} of inner={type(optimizer).__name__} is of type {told}: "
                        "give an optimizer whose state is made of floating-point tensors"
                    )
