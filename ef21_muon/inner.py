"""What is asked of an optimizer that another one is around, and how it begins anew."""

import copy
import weakref
from collections.abc import Callable, Sequence
from inspect import Parameter, signature

from torch import Tensor
from torch.optim import Optimizer

from ef21_muon.communicating import CommunicatingOptimizer
from ef21_muon.exchange.collectives import place_in
from ef21_muon.optimizer import EF21Muon
from ef21_muon.stateful import HOOKS


def require_inner(optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for what cannot step by itself."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer) or getattr(optimizer, "inner", ()):
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
        if getattr(optimizer, "correction", None):
            raise ValueError(
                f"inner={type(optimizer).__name__} with momentum={optimizer.momentum!r} needs a "
                "closure in every step: give momentum='polyak'"
            )
        closure = signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is Parameter.empty:
            raise ValueError(
                f"inner={type(optimizer).__name__} needs a closure in every step: give an "
                "optimizer that steps on gradients"
            )


def guard(outer: CommunicatingOptimizer) -> None:
    """Let the inner optimizers refuse steps while the parameters are W."""
    reference = weakref.ref(outer)  # they may outlive it

    def refuse(inner: Optimizer, args: tuple, kwargs: dict) -> None:
        if (outer := reference()) is not None:
            outer.require_own_parameters(f"{type(inner).__name__}.step()")

    for optimizer in outer.inner:
        optimizer.register_step_pre_hook(refuse)


def missing_of(optimizers: Sequence[Optimizer]) -> dict[Tensor, str]:
    """Of the parameters of this library's optimizers what a missing gradient is."""
    return {
        parameter: optimizer.missing
        for optimizer in optimizers
        if isinstance(optimizer, CommunicatingOptimizer)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def take_over(optimizers: Sequence[Optimizer], changed: bool = True) -> None:
    """Let EF21Muon know that its parameters are others, or with changed=False that they are not."""
    for optimizer in optimizers:
        if isinstance(optimizer, EF21Muon):
            optimizer.take_over(changed)


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


def beginner(optimizer: Optimizer) -> Callable[[], None]:
    """What lets an optimizer begin anew, as a fresh one of its class does, but for its lr.

    To be made before its first step. A fresh optimizer is built from the parameters as they are
    then, the groups as they were given, and `defaults`, and its state is taken over. Raises
    ValueError where the class cannot be built so.
    """
    if isinstance(optimizer, EF21Muon):
        return optimizer.begin_anew
    given = copy.deepcopy([_options(group) for group in optimizer.param_groups])

    def fresh() -> Optimizer:
        kind = type(optimizer)
        taken = signature(kind).parameters.values()
        anything = any(one.kind is Parameter.VAR_KEYWORD for one in taken)
        names = {one.name for one in taken} - {"params"}
        known = vars(optimizer) | optimizer.defaults
        defaults = {k: v for k, v in known.items() if k in names}
        if anything:
            defaults |= optimizer.defaults
        groups = [
            {**copy.deepcopy(options), "params": [*group["params"]]}
            for options, group in zip(given, optimizer.param_groups, strict=True)
        ]
        return kind(groups, **defaults)

    def begin_anew() -> None:
        new = fresh()
        optimizer.state.clear()
        optimizer.state.update(new.state)
        for group, new_group in zip(optimizer.param_groups, new.param_groups, strict=True):
            group.update(_options(new_group))
        kept = {"param_groups", "state", "defaults", *HOOKS}
        vars(optimizer).update({k: v for k, v in vars(new).items() if k not in kept})

    try:
        fresh()
    except Exception as error:  # of any kind that a constructor may raise
        raise ValueError(
            f"inner={type(optimizer).__name__} cannot begin anew, as it has to for a worker that "
            f"was away ({error}): give an optimizer that is built from its groups and defaults, or "
            "fixed workers"
        ) from error
    return begin_anew


def _options(group: dict) -> dict:
    """What is set in a parameter group, without its parameters and what schedulers act on."""
    return {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
