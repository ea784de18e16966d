"""Inner optimizers: what an optimizer around them asks of them, and how they start afresh."""

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from inspect import Parameter, signature

from torch import Tensor, nn
from torch.optim import Optimizer

from ef21_muon.checks.guards import PhaseTimer
from ef21_muon.checks.settings import Compressors, rule_of
from ef21_muon.communicating import Communicating
from ef21_muon.layers import Batch, Layer, layers_of
from ef21_muon.optimizer import EF21Muon
from ef21_muon.state import HOOKS
from ef21_muon.transport.fixed import place_in


class Wrapped:
    """One or several inner optimizers of different parameters, which send nothing themselves.

    Args:
        inner: an optimizer of torch or of any library, or `EF21Muon` with process_group=ALONE; or
            a sequence of optimizers.

    Raises:
        ValueError: for an optimizer that sends messages or cannot step without a closure.
    """

    def __init__(self, inner: Optimizer | Sequence[Optimizer]):
        if isinstance(inner, nn.Module):
            raise ValueError(
                f"inner={type(inner).__name__} is a model: give an optimizer of its parameters, as "
                "torch.optim.AdamW(model.parameters())"
            )
        self.optimizers = [inner] if isinstance(inner, Optimizer) else [*inner]
        for optimizer in self.optimizers:
            _require_inner(optimizer)
        self.ours = [one for one in self.optimizers if isinstance(one, Communicating)]
        self._checked = False

    def communicating(self, inner: Optimizer) -> Communicating | None:
        """Return one of the inner optimizers if it is of this library."""
        return next((one for one in self.ours if one is inner), None)

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all inner optimizers; their load_state_dict replaces them by new ones."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def take(self, outer: Communicating, w2s: Compressors, s2w: Compressors) -> list[dict]:
        """Give the groups to the outer optimizer, and return them with their compressors.

        Args:
            outer: the optimizer around the inner ones.
            w2s: the compressors from workers to servers, one for all groups or one per name.
            s2w: the compressors from servers to workers.
        """
        outer.param_groups = self.param_groups
        outer.defaults = {**self.optimizers[0].defaults}  # schedulers of a momentum look at them
        outer.RULE = tuple({entry for one in self.ours for entry in one.RULE})
        for optimizer in self.ours:
            own = optimizer.generators.items()
            outer.generators |= {f"inner_{purpose}": one for purpose, one in own}
            optimizer.timer = PhaseTimer(None)  # the outer optimizer times its steps
        self.guard(outer)
        return [rule_of(group, w2s, s2w) for group in outer.param_groups]

    def guard(self, outer: Communicating) -> None:
        """Make the inner optimizers refuse steps while the parameters are W."""
        reference = weakref.ref(outer)  # the inner optimizers may outlive it

        def refuse(inner: Optimizer, args: tuple, kwargs: dict) -> None:
            if (outer := reference()) is not None:
                outer.require_own_parameters(f"{type(inner).__name__}.step()")

        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(refuse)

    def step(self) -> None:
        """Take a step of each inner optimizer.

        Raises:
            ValueError: after the first step, for state that is not made of floating-point tensors.
        """
        for optimizer in self.optimizers:
            optimizer.step()
        if not self._checked:
            _require_float_state(self.optimizers)
            self._checked = True

    def layers(self, batches: Sequence[Batch], otherwise: str) -> list[Layer]:
        """Return the layers whose gradients are needed.

        Optimizers of this library have their own `missing_grad`; for others it is `otherwise`.
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
        """Report to inner EF21Muon whether its parameters were `changed` from outside."""
        for optimizer in self.ours:
            if isinstance(optimizer, EF21Muon):
                optimizer.take_over(changed)

    def require_a_gradient(self) -> None:
        """Raise RuntimeError if no parameter has a gradient: they may belong to another model."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if parameters and all(parameter.grad is None for parameter in parameters):
            raise RuntimeError(
                "none of the inner optimizer's parameters has a gradient: build it from the "
                "parameters of the model whose loss.backward() is called, and after moving it to "
                "its device"
            )


def _require_inner(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that cannot be an inner one."""
    name = type(optimizer).__name__
    ours = optimizer if isinstance(optimizer, Communicating) else None
    if not isinstance(optimizer, Optimizer) or (ours and ours.inner):
        raise ValueError(
            f"inner={name} is not allowed: give a torch optimizer, which takes the steps"
        )
    if ours and place_in(ours.process_group)[1] > 1:
        raise ValueError(
            f"inner={name} sends messages itself: build it with process_group=ALONE "
            "(from ef21_muon import ALONE)"
        )
    if isinstance(optimizer, EF21Muon) and optimizer.correction:
        raise ValueError(
            f"inner={name} with momentum_kind={optimizer.momentum_kind!r} needs a closure in "
            "every step: give momentum_kind='polyak'"
        )
    if ours and (lossy := [r["w2s"] for r in ours.rules if not r["w2s"].lossless]):
        warnings.warn(
            f"inner={name} compresses its own gradients with w2s={lossy[0]!r}, which saves no "
            "bytes: give w2s to the optimizer around it",
            stacklevel=5,
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
    """Return a function that resets an optimizer to a fresh one of its class, except for its lr.

    Call this before the optimizer's first step. The function builds a fresh optimizer from the
    parameters as they are then, the groups as they were given, and `defaults`, and takes over its
    state.

    Raises:
        ValueError: if the class cannot be built in this way.
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
    except Exception as error:  # constructors may raise any error
        raise ValueError(
            f"inner={type(optimizer).__name__} cannot begin anew, as it has to for a worker that "
            f"was away ({error}): give an optimizer that is built from its groups and defaults, or "
            "fixed workers"
        ) from error
    return begin_anew


def _options(group: dict) -> dict:
    """Return the options of a parameter group that schedulers do not change."""
    return {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
