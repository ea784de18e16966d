"""What an optimizer remembers: saved and loaded.

A state has two entries, as those of torch's optimizers, so that torch.distributed.checkpoint keeps
all of it. "param_groups" is one. "state" is the other: it has {"rank0": tensor} by parameter and
table, named after the rank that holds the tensor, since ranks remember different things. Beside the
first tensor, "rank0_rest" has the rest: identity, counters, random numbers, buffers and inner
optimizers, in tensors whose sizes stay the same throughout a training. A checkpoint of all ranks in
one folder, and how to continue from it in a new process:

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    name = f"model{dist.get_rank()}"  # LocalSteps: workers' models differ; else "model" will do
    model_state, optim_state = get_state_dict(model, optimizer)
    dcp.save({name: model_state, "optim": optim_state}, checkpoint_id="step-100")

    model_state, optim_state = get_state_dict(model, optimizer)  # of new ones
    dcp.load({name: model_state, "optim": optim_state}, checkpoint_id="step-100")
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optim_state)

Torch's options cpu_offload and flatten_optimizer_state_dict work, the latter where torch flattens
dictionaries in a state, which 2.9 does not; full_state_dict is refused on several ranks, since it
would keep the state of rank 0 alone.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ef21_muon.checks.arithmetic import first_state
from ef21_muon.checks.identity import described, require_identity, require_layout, state_identity
from ef21_muon.transport.fixed import Traffic, place_in
from ef21_muon.views import asked_for, show_groups

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating

HOOKS = tuple(
    f"_optimizer_{when}_hooks"
    for when in (
        *("step_pre", "step_post", "state_dict_pre", "state_dict_post"),
        *("load_state_dict_pre", "load_state_dict_post"),
    )
)
REST = "_rest"
PAGE = 4096  # bytes that the text of an identity fills a multiple of
NO_TEXT = json.JSONDecodeError, UnicodeDecodeError


def save(optimizer: "Communicating") -> dict:
    """Return a copy of the state; see `Communicating.state_dict`."""
    optimizer.require_own_parameters("state_dict()")
    _refuse_full(optimizer)
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    holder = _holder()
    tables: dict[int, dict[str, dict]] = {
        numbers[parameter]: {key: {holder: tensor.clone()} for key, tensor in own.items()}
        for parameter, own in optimizer.state.items()
    }
    first = next((one for n in sorted(tables) for one in tables[n].values()), None)
    if first is None:  # when a state is flattened, torch finds the names of tables alone
        if asked_for("flatten_optimizer_state_dict"):
            raise ValueError(
                "flatten_optimizer_state_dict=True is not allowed where a rank remembers nothing "
                "of its layers: leave it out, or give server='replicated'"
            )
        first = tables.setdefault(0, {}).setdefault("none", {})
    first[holder + REST] = _rest(optimizer)
    groups = [
        {key: described(one) if key in optimizer.RULE else one for key, one in group.items()}
        | {"params": [numbers[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {"state": tables, "param_groups": copy.deepcopy(groups)}
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        changed = after(optimizer, state)
        state = state if changed is None else changed
    if optimizer.unsent:
        optimizer.unsent.steps = 0
    return state


def gather(optimizer: "Communicating") -> dict | None:
    """Return the states of all ranks on rank 0; see `Communicating.full_state_dict`."""
    mine = optimizer.state_dict()
    rank, ranks = place_in(optimizer.everyone)
    if ranks == 1 or isinstance(optimizer.everyone, str):
        return {"ranks": [mine]}
    states: list[dict] | None = [{}] * ranks if rank == 0 else None
    dist.gather_object(mine, states, group=optimizer.everyone, group_dst=0)
    return {"ranks": states} if rank == 0 else None


def load(optimizer: "Communicating", state_dict: dict | None) -> None:
    """Continue from a state; see `Communicating.load_state_dict`."""
    optimizer.require_own_parameters("load_state_dict()")
    _refuse_full(optimizer)
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
    saved, pairs = _checked(optimizer, state_dict)
    optimizer.buffers.load(saved["buffers"])
    for inner, its in zip(optimizer.inner, saved["inner"], strict=True):
        inner.load_state_dict(copy.deepcopy(its))
    if optimizer.wrapped:
        show_groups(optimizer)
    for tensor, its in pairs:
        tensor.copy_(its)
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update(copy.deepcopy({k: v for k, v in values.items() if k != "params"}))
    optimizer.transport.traffic = saved["traffic"]
    optimizer.resume_after(saved["steps"])
    for purpose, generator in optimizer.generators.items():
        generator.set_state(saved["generators"][purpose].cpu())
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _rest(optimizer: "Communicating") -> dict:
    """Return what there is beside tables and groups."""
    buffers = optimizer.buffers.state()
    text = json.dumps(state_identity(optimizer) | {"buffer names": [*buffers]}).encode()
    text += b" " * (-len(text) % PAGE)
    device = optimizer.device
    rest = {
        "of": torch.tensor(list(text), dtype=torch.uint8, device=device),
        "counters": torch.tensor([optimizer.steps, *optimizer.traffic.state()], device=device),
        "generators": {key: g.get_state().to(device) for key, g in optimizer.generators.items()},
        "buffers": {str(n): one for n, one in enumerate(buffers.values())},
        "inner": {str(n): _inner(optimizer, one) for n, one in enumerate(optimizer.inner)},
    }
    if optimizer.mesh:  # torch keeps the groups of one rank, and those of others differ
        rest["groups"] = {
            str(n): _numbers(optimizer, group) for n, group in enumerate(optimizer.param_groups)
        }
    return rest


def _inner(optimizer: "Communicating", inner: Optimizer) -> dict:
    """Return an inner optimizer's state by parameter.

    It also has what a first step would make, so that a checkpoint can be read into it; `entries`
    has how many of each parameter are real, and -1 where there was no step.
    """
    state = copy.deepcopy(inner.state_dict()["state"])
    if optimizer.wrapped and optimizer.wrapped.communicating(inner):
        return {"state": {str(number): own for number, own in state.items()}}
    numbers = range(sum(len(group["params"]) for group in inner.param_groups))
    entries = [len(state[number]) if number in state else -1 for number in numbers]
    if -1 in entries:
        state = first_state(inner) | state
    return {
        "state": {str(number): state.get(number, {}) for number in numbers},
        "entries": torch.tensor(entries, device=optimizer.device),
    }


def _numbers(optimizer: "Communicating", group: Mapping) -> dict:
    """Return the numbers of a parameter group; a sequence of them becomes {"0": number, ...}."""
    found = {}
    for key, value in group.items():
        if isinstance(value, tuple | list) and key != "params":
            value = {str(place): one for place, one in enumerate(value)}
        numbers = value.values() if isinstance(value, dict) else [value]
        if key not in optimizer.RULE and all(isinstance(n, int | float | Tensor) for n in numbers):
            found[key] = copy.deepcopy(value)
    return found


def _checked(
    optimizer: "Communicating", state_dict: Mapping
) -> tuple[dict, list[tuple[Tensor, Tensor]]]:
    """Return this rank's state, and every tensor beside the saved one.

    Raises:
        ValueError: if it is damaged, of something else, or does not fit.
    """
    try:
        saved = _part_of(optimizer, state_dict)
        return saved, _fitting(optimizer, saved)
    except (*(AttributeError, LookupError, TypeError, ZeroDivisionError), *NO_TEXT) as error:
        raise ValueError(
            f"the state is damaged ({error!r}): load what {type(optimizer).__name__}.state_dict() "
            "or full_state_dict() gave"
        ) from error


def _part_of(optimizer: "Communicating", state_dict: Mapping) -> dict:
    """Return this rank's state, without the names of ranks. Raises ValueError if it has none."""
    mine = state_identity(optimizer)
    states = state_dict.get("ranks", [state_dict])
    state_dict = states[min(place_in(optimizer.everyone)[0], len(states) - 1)]
    held = [one for own in state_dict["state"].values() for one in own.values()]
    tables = [one for one in held if isinstance(one, Mapping)]
    names = [key for one in tables for key in one if key.endswith(REST)]
    if not names:
        raise ValueError(
            "the state lacks what it is of, its counters and its random numbers: load what "
            f"{mine['method']}.state_dict() or full_state_dict() gave, not a part of it"
        )
    name = own if (own := _holder() + REST) in names else names[0]
    holder, rest = name.removesuffix(REST), next(one[name] for one in tables if name in one)
    of = json.loads(bytes(rest["of"].tolist()))
    buffers = of.pop("buffer names", ())
    require_identity(mine, of)
    groups = _groups(optimizer, state_dict["param_groups"], rest.get("groups"))
    numbers = [number for group in groups for number in group["params"]]
    steps, *traffic = rest["counters"].tolist()
    return {
        "state": [
            {
                key: one[holder]
                for key, one in state_dict["state"].get(number, {}).items()
                if isinstance(one, Mapping) and holder in one
            }
            for number in numbers
        ],
        "param_groups": groups,
        "steps": steps,
        "traffic": Traffic.from_state(traffic),
        "generators": rest["generators"],
        "buffers": {name: rest["buffers"][str(n)] for n, name in enumerate(buffers)},
        "inner": [*_inner_states(optimizer, groups, rest.get("inner", {}))],
    }


def _groups(
    optimizer: "Communicating", saved: list[Mapping], numbers: Mapping | None
) -> list[dict]:
    """Return the groups with saved values and without objects. Raises ValueError for other groups.

    numbers: this rank's own, for workers of several ranks. torch saves the groups of one rank only.
    """
    named = any(isinstance(name, str) for group in saved for name in group["params"])
    layout, saved_layout = (
        [(len(group["params"]), None if named else group.get("param_names")) for group in groups]
        for groups in (optimizer.param_groups, saved)
    )
    if layout != saved_layout:
        raise ValueError(
            f"the state holds parameter groups {saved_layout}, this optimizer {layout}: "
            "build it from the same groups"
        )
    found = []
    for place, (group, its) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        if named and numbers is not None:
            its = {"params": its["params"], **numbers[str(place)]}
        kept = {key: value for key, value in its.items() if key not in optimizer.RULE}
        for key, value in kept.items():  # torch makes lists of tuples
            if isinstance(like := group.get(key), tuple | list):
                kept[key] = type(like)(value.values() if isinstance(value, Mapping) else value)
        found.append({k: v for k, v in group.items() if k not in optimizer.RULE} | kept)
    return found


def _inner_states(optimizer: "Communicating", groups: list[dict], saved: Mapping) -> Iterator[dict]:
    """Yield the states of inner optimizers as these load them, whose groups are those of all."""
    remaining = iter(groups)
    for place, inner in enumerate(optimizer.inner):
        its, numbers = saved[str(place)], count()
        its_groups = [
            {**group, **next(remaining), "params": [next(numbers) for _ in group["params"]]}
            for group in inner.param_groups
        ]
        state = {int(number): own for number, own in its["state"].items()}
        for number, entries in enumerate(its["entries"].tolist() if "entries" in its else ()):
            own = state.pop(number, {}) if entries < 0 else state.setdefault(number, {})
            if len(own) != entries >= 0:
                raise ValueError(
                    f"the state lacks what inner={type(inner).__name__} remembers, which was not "
                    "known when it was read: let this one take a step before, or load a whole file"
                )
        yield {"state": state, "param_groups": its_groups}


def _fitting(optimizer: "Communicating", saved: dict) -> list[tuple[Tensor, Tensor]]:
    """Return every tensor of the state with the saved one. ValueError for other shapes."""
    if not (type(saved["steps"]) is int and saved["steps"] >= 0):
        raise ValueError(
            f"the state is after {saved['steps']!r} steps: give a whole number, at least 0"
        )
    for purpose, generator in optimizer.generators.items():
        its, now = saved["generators"][purpose], generator.get_state()
        if its.shape != now.shape:
            raise ValueError(
                f"the state holds {len(its)} bytes of random numbers where this device has "
                f"{len(now)}: load it on the kind of device that it was saved on"
            )
    optimizer.buffers.require_fit(saved["buffers"])
    for inner, its in zip(optimizer.inner, saved["inner"], strict=True):
        own = optimizer.wrapped.communicating(inner) if optimizer.wrapped else None
        if own is None:
            require_layout(inner, its)
        else:
            _checked(own, its)
    pairs = []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, its in zip(parameters, saved["state"], strict=True):
        here = optimizer.state[parameter]
        shapes, saved_shapes = (
            {key: tuple(tensor.shape) for key, tensor in sorted(one.items())} for one in (here, its)
        )
        if shapes != saved_shapes:
            raise ValueError(
                f"the state holds {saved_shapes} where this optimizer needs {shapes}: build it "
                "from the same groups and options, and load on the same rank"
            )
        pairs += [(here[key], its[key]) for key in here]
    return pairs


def _holder() -> str:
    """Return the name of this rank among all, which no other rank has."""
    return f"rank{dist.get_rank() if dist.is_initialized() else 0}"


def _refuse_full(optimizer: "Communicating") -> None:
    """Raise ValueError where torch would keep one rank's state alone."""
    _, ranks = place_in(optimizer.everyone)
    if ranks > 1 and asked_for("full_state_dict"):
        raise ValueError(
            f"full_state_dict=True keeps the state of rank 0 alone, and each of {ranks} ranks has "
            "its own: leave it out and save on all ranks by torch.distributed.checkpoint, or save "
            f"{type(optimizer).__name__}.full_state_dict()"
        )
