"""The identity of an optimizer: its class and all options that change steps, as plain values."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from numbers import Real
from types import FunctionType
from typing import TYPE_CHECKING

from torch import Tensor, dtype
from torch.optim import Optimizer

from ef21_muon.checks.settings import SCHEDULED
from ef21_muon.transport.fixed import place_in

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating

# Entries of a parameter group that do not change a step, or that schedulers change.
LEFT_OUT = {
    *("params", "param_names", "foreach", "fused", "capturable", "differentiable"),
    *SCHEDULED,
}
# Parameters of constructors that do not change the method.
NO_OPTIONS = {
    *("params", "defaults", "inner", "transport", "mesh", "process_group", "buffers", "self"),
    *("purposes", "stream", "args", "kwargs", "buckets"),
}
# Options that may differ between a state and the optimizer that loads it.
MAY_CHANGE = ("lr", "missing_grad")
NAMED = 3  # the number of differences that an error names
DEEPEST = 4  # the nesting of objects up to which attributes are described


def described(value: object, depth: int = 0) -> object:
    """Return a plain value as it is, and any other as a text that is the same in every process.

    The text of an object is its class and its attributes: TopK(fraction=0.3, values=Float32()).
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Real):  # a number of NumPy
        return float(value)
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        return {str(key): described(one, depth) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [described(one, depth) for one in value]
    if isinstance(value, type | FunctionType):
        return value.__qualname__
    name = type(value).__qualname__
    if not hasattr(value, "__dict__") or depth == DEEPEST:
        return str(value) if isinstance(value, dtype) else name
    attributes = sorted(vars(value).items())
    own = (f"{key.lstrip('_')}={described(one, depth + 1)}" for key, one in attributes)
    return f"{name}({', '.join(own)})"


def shapes_of(groups: Sequence[dict]) -> dict[str, str]:
    """Return the shape and dtype of every parameter, by its name or its number in its group."""
    shapes = {}
    for index, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            name = group["param_names"][place] if "param_names" in group else f"parameter {place}"
            shape = f"{tuple(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"
            shapes[f"shape of {name} of group {index}"] = shape
    return shapes


def options_of(groups: Sequence[dict], entries: Iterable[str]) -> dict[str, object]:
    """Return those of the entries that parameter groups have, as plain values.

    Args:
        groups: parameter groups.
        entries: names of entries; those in `LEFT_OUT` do not count.

    Returns:
        {"entry of group index": plain value}.
    """
    entries = [entry for entry in dict.fromkeys(entries) if entry not in LEFT_OUT]
    options = {}
    for index, group in enumerate(groups):
        for entry in entries:
            if entry in group:
                options[f"{entry} of group {index}"] = described(group[entry])
    return options


def identity_of(inner: Optimizer) -> dict[str, object]:
    """Return the class and the current options of an optimizer of any library, as plain values."""
    kind = type(inner)
    entries = ("name", *inner.defaults)
    identity: dict[str, object] = {"method": f"{kind.__module__}.{kind.__qualname__}"}
    for name in signature(kind).parameters.keys() - inner.defaults.keys() - {"params"}:
        if isinstance(value := vars(inner).get(name), bool | int | float | str):
            identity[name] = value
    return dict(sorted(identity.items())) | options_of(inner.param_groups, entries)


def settings_of(optimizer: "Communicating") -> dict[str, object]:
    """Return all options of a `Communicating` as plain values; all ranks have to have the same.

    These are attributes with the names of its constructor's parameters, entries of its groups,
    compressors, and the options of inner optimizers.
    """
    named = {
        name
        for kind in type(optimizer).__mro__
        for name in signature(kind.__init__).parameters  # type: ignore[misc]  # of a class
    }
    values = vars(optimizer)
    own = {name: described(values[name]) for name in sorted((named - NO_OPTIONS) & values.keys())}
    settings = {"method": type(optimizer).__name__, "ranks": place_in(optimizer.everyone)[1], **own}
    # The options of inner optimizers are described below.
    entries = () if optimizer.inner else ("name", *optimizer.defaults)
    settings |= options_of(optimizer.param_groups, entries) | shapes_of(optimizer.param_groups)
    settings["buffers"] = str(optimizer.buffers)
    if "rounds" in values:
        settings["sync_every"] = str(values["rounds"])
    for index, rule in enumerate(optimizer.rules):
        for direction in ("w2s", "s2w"):
            settings[f"{direction} of group {index}"] = described(rule[direction])
    for place, inner in enumerate(optimizer.inner):
        ours = optimizer.wrapped.communicating(inner) if optimizer.wrapped else None
        its = identity_of(inner) if ours is None else settings_of(ours)
        settings |= {f"{key} of inner {place}": value for key, value in its.items()}
    if optimizer.inner:
        settings["number of inner optimizers"] = len(optimizer.inner)
    server = settings.pop("server", None)  # the last, since "auto" follows from the others
    # A single worker takes the same steps for every placement.
    return settings if server is None or optimizer.ranks == 1 else settings | {"server": server}


def without_free(identity: Mapping[str, object]) -> dict[str, object]:
    """Return an identity without the options that may change between saving and loading a state."""
    return {
        key: value for key, value in identity.items() if key.partition(" of ")[0] not in MAY_CHANGE
    }


def differences(mine: Mapping, theirs: Mapping, text: str, most: int = NAMED) -> str:
    """Return the differences of two mappings as a text for an error; empty if they are equal.

    Args:
        mine: one mapping.
        theirs: the other.
        text: the text for one difference, with {key}, {mine} and {theirs} in it.
        most: the number of differences that are named, default 3.
    """
    missing = "not there"
    found = [
        text.format(key=key, mine=mine.get(key, missing), theirs=theirs.get(key, missing))
        for key in dict.fromkeys([*mine, *theirs])
        if mine.get(key, missing) != theirs.get(key, missing)
    ]
    more = len(found) - most
    return ", ".join([*found[:most], *([f"and {more} more"] if more > 0 else [])])


def state_identity(optimizer: "Communicating") -> dict[str, object]:
    """Return what a state is of: the place of this rank, the method, and all options when built."""
    rank, ranks = place_in(optimizer.everyone)
    own = {"method": type(optimizer).__name__, "rank": rank, "ranks": ranks}
    return own | without_free(optimizer._built_as)


def require_identity(mine: Mapping, of: Mapping) -> None:
    """Raise ValueError for a state of something else."""
    differing = differences(mine, of, "{key} {theirs!r} (here {mine!r})")
    if not differing:
        return
    advice = (
        "build the optimizer as that one was, load, and then change numbers in param_groups, and "
        "compressors by exchange_compressor"
    )
    if mine["ranks"] != of.get("ranks"):
        advice = "start as many ranks as it was saved on"
    elif mine["rank"] != of.get("rank"):
        advice = (
            "load it where it was saved, on every rank its own, or save full_state_dict() and load "
            "that on all"
        )
    raise ValueError(f"the state is of {differing}: {advice}")


def require_layout(inner: Optimizer, saved: Mapping) -> None:
    """Raise ValueError if a saved state belongs to other groups or parameters.

    If a parameter has state already, the saved one needs the same entries with the same shapes.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    own = [len(group["params"]) for group in inner.param_groups]
    if [len(group["params"]) for group in saved["param_groups"]] != own:
        raise ValueError(f"the state of {type(inner).__name__} is of other parameter groups")
    for number, parameter in zip(numbers, parameters, strict=True):
        entries, its = saved["state"].get(number), inner.state.get(parameter)
        if entries and its and _shapes(entries) != _shapes(its):
            raise ValueError(
                f"the state of {type(inner).__name__} holds {_shapes(entries)} where this one has "
                f"{_shapes(its)}: load what state_dict() gave"
            )


def _shapes(state: Mapping) -> dict[str, object]:
    """Return the shapes of a parameter's state by its entries, sorted."""
    return {
        key: tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
        for key, one in sorted(state.items())
    }
