"""Optimizers that another one is around: what is asked of them, and how one begins anew."""

import copy
import weakref
from collections.abc import Callable, Sequence
from inspect import Parameter, signature

from torch import Tensor
from torch.optim import Optimizer

from ef21_muon.communicating import Communicating
from ef21_muon.guards import PhaseTimer
from ef21_muon.layers import Batch, Layer, layers_of
from ef21_muon.optimizer import EF21Muon
from ef21_muon.settings import Compressors, rule_of
from ef21_muon.state import HOOKS
from ef21_muon.transport.fixed import place_in


class Wrapped:
    """One or several optimizers of different parameters, that send nothing.

    Raises ValueError for one that cannot step by itself.
    """

    def __init__(self, inner: Optimizer | Sequence[Optimizer]):
        self.optimizers = [inner] if isinstance(inner, Optimizer) else [*inner]
        for optimizer in self.optimizers:
            _require_inner(optimizer)
        self.ours = [one for one in self.optimizers if isinstance(one, Communicating)]
        self._checked = False

    @property
    def param_groups(self) -> list[dict]:
        """Of all of them, whose load_state_dict makes others of the same parameters."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def take(self, outer: Communicating, w2s: Compressors, s2w: Compressors) -> list[dict]:
        """Give their groups to the optimizer around them; the compressors of every group."""
        outer.param_groups = self.param_groups
        outer.defaults = {**self.optimizers[0].defaults}  # as schedulers of a momentum look at
        outer.RULE = tuple({entry for one in self.ours for entry in one.RULE})
        for optimizer in self.ours:
            own = optimizer.generators.items()
            outer.generators |= {f"inner_{purpose}": one for purpose, one in own}
            optimizer.timer = PhaseTimer(None)  # its time is a phase of the outer one's
        self.guard(outer)
        return [rule_of(group, w2s, s2w) for group in outer.param_groups]

    def guard(self, outer: Communicating) -> None:
        """Let them refuse steps while the parameters are W."""
        reference = weakref.ref(outer)  # they may outlive it

        def refuse(inner: Optimizer, args: tuple, kwargs: dict) -> None:
            if (outer := reference()) is not None:
                outer.require_own_parameters(f"{type(inner).__name__}.step()")

        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(refuse)

    def step(self) -> None:
        """A step of each. ValueError from the first for state that is not made of float tensors."""
        for optimizer in self.optimizers:
            optimizer.step()
        if not self._checked:
            _require_float_state(self.optimizers)
            self._checked = True

    def layers(self, batches: Sequence[Batch], otherwise: str) -> list[Layer]:
        """Whose gradients are needed: what a missing one is this library's optimizers know.

        otherwise: of the others' parameters.
        """
        missing = {
            parameter: optimizer.missing_grad
            for optimizer in self.ours
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        layers = layers_of(batches, otherwise)
        return [one._replace(missing_grad=missing.get(one.parameter, otherwise)) for one in layers]

    def take_over(self, changed: bool = True) -> None:
        """Let EF21Muon know that its parameters are others or, if not `changed`, are not."""
        for optimizer in self.ours:
            if isinstance(optimizer, EF21Muon):
                optimizer.take_over(changed)

    def require_a_gradient(self) -> None:
        """Raise RuntimeError if no parameter has one: they may be of another model."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if parameters and all(parameter.grad is None for parameter in parameters):
            raise RuntimeError(
                "none of the inner optimizer's parameters has a gradient: build it from the "
                "parameters of the model whose loss.backward() is called, and after moving it to "
                "its device"
            )


def _require_inner(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    ours = isinstance(optimizer, Communicating)
    if not isinstance(optimizer, Optimizer) or (ours and optimizer.inner):
        raise ValueError(
            f"inner={name} is not allowed: give a torch optimizer, which takes the steps"
        )
    if ours and place_in(optimizer.process_group)[1] > 1:
        raise ValueError(
            f"inner={name} sends messages itself: build it with process_group=ALONE "
            "(from ef21_muon import ALONE)"
        )
    if isinstance(optimizer, EF21Muon) and optimizer.correction:
        raise ValueError(
            f"inner={name} with momentum_kind={optimizer.momentum_kind!r} needs a closure in every step: "
            "give momentum_kind='polyak'"
        )
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise ValueError(
            f"inner={name} needs a closure in every step: give an optimizer that steps on gradients"
        )


def _require_float_state(optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for inner state that a checkpoint could not hold exactly as tensors."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for key, value in state.items():
                if not (isinstance(value, Tensor) and value.is_floating_point()):
                    kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(
                        f"the state {key!r} of inner={type(optimizer).__name__} is of type {kind}: "
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
