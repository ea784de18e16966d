"""What an optimizer remembers: saved and loaded."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ef21_muon.identity import differences, require_layout, without_free
from ef21_muon.transport.fixed import Traffic, place_in

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating

HOOKS = tuple(
    f"_optimizer_{when}_hooks"
    for when in (
        *("step_pre", "step_post", "state_dict_pre", "state_dict_post"),
        *("load_state_dict_pre", "load_state_dict_post"),
    )
)
# What every state has, beside what it is of.
PARTS = ("state", "param_groups", "round", "steps", "traffic", "generators")


def save(optimizer: "Communicating") -> dict:
    """A copy of the state; see `Communicating.state_dict`."""
    optimizer.require_own_parameters("state_dict()")
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    groups = [
        {key: value for key, value in group.items() if key not in optimizer.RULE}
        | {"params": [numbers[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {
        "state": {
            numbers[parameter]: {key: tensor.clone() for key, tensor in own.items()}
            for parameter, own in optimizer.state.items()
        },
        "param_groups": copy.deepcopy(groups),
        "of": _identity(optimizer),
        "round": optimizer.round,
        "steps": optimizer.steps,
        "traffic": optimizer.traffic.state(),
        "generators": {key: one.get_state() for key, one in optimizer.generators.items()},
    }
    if shared := optimizer.buffers.state():
        state["buffers"] = shared
    if optimizer.inner:
        state["inner"] = [copy.deepcopy(one.state_dict()) for one in optimizer.inner]
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        changed = after(optimizer, state)
        state = state if changed is None else changed
    return state


def load(optimizer: "Communicating", state_dict: dict | None) -> None:
    """Go on from a state; see `Communicating.load_state_dict`."""
    optimizer.require_own_parameters("load_state_dict()")
    if state_dict is None:
        raise ValueError(
            "the state is None, as full_state_dict() gives it on all ranks but 0: save it "
            "there, and load the file on every rank"
        )
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"the state is of type {type(state_dict).__name__}: load what state_dict() gave"
        )
    state_dict = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    try:
        state_dict = _part_of(optimizer, state_dict)
        pairs, traffic = _fitting(optimizer, state_dict), Traffic.from_state(state_dict["traffic"])
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"the state is damaged ({error!r}): load what {type(optimizer).__name__}.state_dict() "
            "or full_state_dict() gave"
        ) from error
    optimizer.buffers.load(state_dict.get("buffers", {}))
    for inner, saved in zip(optimizer.inner, state_dict.get("inner", ()), strict=True):
        inner.load_state_dict(copy.deepcopy(saved))
    if optimizer.wrapped:
        optimizer.param_groups = optimizer.wrapped.param_groups
    for tensor, saved in pairs:
        tensor.copy_(saved)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group.update(copy.deepcopy({k: v for k, v in saved.items() if k != "params"}))
    optimizer.transport.traffic = traffic
    optimizer.resume_after(state_dict["steps"])
    for purpose, generator in optimizer.generators.items():
        generator.set_state(state_dict["generators"][purpose].cpu())
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _identity(optimizer: "Communicating") -> dict:
    """What a state is of: the place of this rank, the method, and all options when built."""
    rank, ranks = place_in(optimizer.everyone)
    own = {"method": type(optimizer).__name__, "rank": rank, "ranks": ranks}
    return own | without_free(optimizer._built_as)


def _part_of(optimizer: "Communicating", state_dict: dict) -> dict:
    """This rank's state. Raises ValueError for one that is of something else."""
    mine = _identity(optimizer)
    states = state_dict.get("ranks", [state_dict])
    state_dict = states[min(mine["rank"], len(states) - 1)]
    of = state_dict.get("of", mine)
    if differing := differences(mine, of, "{key} {theirs!r} (here {mine!r})"):
        if mine["ranks"] != of.get("ranks"):
            advice = "start as many ranks as it was saved on"
        elif mine["rank"] != of.get("rank"):
            advice = (
                "load it where it was saved, on every rank its own, or save full_state_dict() "
                "and load that on all"
            )
        else:
            advice = (
                "build the optimizer as that one was, load, and then change in param_groups "
                "what is to change"
            )
        raise ValueError(f"the state is of {differing}: {advice}")
    needed = {"of", *PARTS, "inner"} if optimizer.inner else {"of", *PARTS}
    if not state_dict.keys() >= needed:
        raise ValueError(
            "the state lacks what it is of, its counters and its random numbers: load what "
            f"{mine['method']}.state_dict() or full_state_dict() gave, not a part of it"
        )
    return state_dict


def _fitting(optimizer: "Communicating", state_dict: dict) -> list[tuple[Tensor, Tensor]]:
    """Every tensor of the state and the saved one. Raises ValueError if they do not fit.

    And for counters and random numbers that could not be loaded.
    """
    if not (type(state_dict["steps"]) is int and state_dict["steps"] >= 0):
        raise ValueError(
            f"the state is after {state_dict['steps']!r} steps: give a whole number, at least 0"
        )
    for purpose, generator in optimizer.generators.items():
        saved, here = state_dict["generators"][purpose], generator.get_state()
        if saved.shape != here.shape:
            raise ValueError(
                f"the state holds {len(saved)} bytes of random numbers where this device has "
                f"{len(here)}: load it on the kind of device that it was saved on"
            )
    saved_groups = state_dict["param_groups"]
    layout, saved_layout = (
        [(len(group["params"]), group.get("param_names")) for group in groups]
        for groups in (optimizer.param_groups, saved_groups)
    )
    if layout != saved_layout:
        raise ValueError(
            f"the state holds parameter groups {saved_layout}, this optimizer {layout}: "
            "build it from the same groups"
        )
    optimizer.buffers.require_fit(state_dict.get("buffers", {}))
    _require_inner(optimizer, state_dict.get("inner", ()))
    pairs = []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in saved_groups for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        own, saved = optimizer.state[parameter], state_dict["state"][index]
        shapes, saved_shapes = (
            {key: tuple(tensor.shape) for key, tensor in sorted(one.items())}
            for one in (own, saved)
        )
        if shapes != saved_shapes:
            raise ValueError(
                f"the state holds {saved_shapes} where this optimizer needs {shapes}: build it "
                "from the same groups and options, and load on the same rank"
            )
        pairs += [(own[key], saved[key]) for key in own]
    return pairs


def _require_inner(optimizer: "Communicating", saved_inner: Sequence[dict]) -> None:
    if len(saved_inner) != len(optimizer.inner):
        raise ValueError(
            f"the state holds {len(saved_inner)} inner optimizers, this one has "
            f"{len(optimizer.inner)}: load what state_dict() gave"
        )
    for inner, saved in zip(optimizer.inner, saved_inner, strict=True):
        own = optimizer.wrapped.communicating(inner) if optimizer.wrapped else None
        if own is None:
            require_layout(inner, saved)
        else:
            _fitting(own, _part_of(own, saved))
