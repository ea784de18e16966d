"""What an optimizer is: its class and every option that changes its steps, as plain values."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from numbers import Number
from types import FunctionType

from torch import Tensor, dtype
from torch.optim import Optimizer

from ef21_muon.transport.fixed import place_in

# Entries of a parameter group that do not change a step, or that schedulers change.
LEFT_OUT = {
    *("params", "param_names", "foreach", "fused", "capturable", "differentiable"),
    *("initial_lr", "max_lr", "min_lr"),
}
# Parameters of constructors that are no options of the method.
NO_OPTIONS = {
    *("params", "defaults", "inner", "transport", "mesh", "process_group", "buffers", "self"),
    *("purposes", "stream", "args", "kwargs", "buckets"),
}
# What may differ between a state and the optimizer that loads it.
MAY_CHANGE = ("lr", "missing_grad")
NAMED = 3  # differences that a message names
DEEPEST = 4  # of objects within objects


def described(value: object, depth: int = 0) -> object:
    """The value if it is plain, else a text that is the same in every process.

    An object is its class and its attributes: TopK(fraction=0.3, values=Natural(stochastic=True)).
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Number):  # of numpy
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
    """Of every parameter, by its name or its number in its group, shape and type."""
    shapes = {}
    for index, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            name = group["param_names"][place] if "param_names" in group else f"parameter {place}"
            shape = f"{tuple(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"
            shapes[f"shape of {name} of group {index}"] = shape
    return shapes


def options_of(groups: Sequence[dict], entries: Iterable[str]) -> dict[str, object]:
    """Of every parameter group those of the entries that it has.

    Returns {"entry of group index": described value}.
    """
    entries = [entry for entry in dict.fromkeys(entries) if entry not in LEFT_OUT]
    options = {}
    for index, group in enumerate(groups):
        for entry in entries:
            if entry in group:
                options[f"{entry} of group {index}"] = described(group[entry])
    return options


def identity_of(inner: Optimizer) -> dict[str, object]:
    """Of an optimizer of torch, or of anyone: its class and options as they are now."""
    kind = type(inner)
    entries = ("name", *inner.defaults)
    identity = {"method": f"{kind.__module__}.{kind.__qualname__}"}
    for name in signature(kind).parameters.keys() - inner.defaults.keys() - {"params"}:
        if isinstance(value := vars(inner).get(name), bool | int | float | str):
            identity[name] = value
    return dict(sorted(identity.items())) | options_of(inner.param_groups, entries)


def settings_of(optimizer) -> dict[str, object]:
    """All options of a Communicating as plain values, which all ranks have to be given alike.

    Those that have the names of its constructor's parameters, and those of its groups, of the
    compressors and of inner optimizers.
    """
    named = {
        name for kind in type(optimizer).__mro__ for name in signature(kind.__init__).parameters
    }
    values = vars(optimizer)
    own = {name: described(values[name]) for name in sorted((named - NO_OPTIONS) & values.keys())}
    settings = {"method": type(optimizer).__name__, "ranks": place_in(optimizer.everyone)[1], **own}
    entries = () if optimizer.inner else ("name", *optimizer.defaults)  # theirs are their own
    settings |= options_of(optimizer.param_groups, entries) | shapes_of(optimizer.param_groups)
    settings["buffers"] = str(optimizer.buffers)
    if "rounds" in values:
        settings["sync_every"] = str(values["rounds"])
    for index, rule in enumerate(optimizer.rules):
        for direction in ("w2s", "s2w"):
            settings[f"{direction} of group {index}"] = described(rule[direction])
    for place, inner in enumerate(optimizer.inner):
        its = settings_of(inner) if inner in optimizer.wrapped.ours else identity_of(inner)
        settings |= {f"{key} of inner {place}": value for key, value in its.items()}
    if optimizer.inner:
        settings["number of inner optimizers"] = len(optimizer.inner)
    server = settings.pop("server", None)  # last, since "auto" follows from the others
    # The steps of one worker are the same wherever its servers are.
    return settings if server is None or optimizer.ranks == 1 else settings | {"server": server}


def without_free(identity: Mapping[str, object]) -> dict[str, object]:
    """An identity without what may change between a state and the optimizer that loads it."""
    return {
        key: value for key, value in identity.items() if key.partition(" of ")[0] not in MAY_CHANGE
    }


def differences(mine: Mapping, theirs: Mapping, text: str, most: int = NAMED) -> str:
    """What differs, for an error; empty where nothing does.

    text: of one difference, with {key}, {mine} and {theirs} in it. most: how many are named.
    """
    missing = "not there"
    found = [
        text.format(key=key, mine=mine.get(key, missing), theirs=theirs.get(key, missing))
        for key in dict.fromkeys([*mine, *theirs])
        if mine.get(key, missing) != theirs.get(key, missing)
    ]
    more = len(found) - most
    return ", ".join([*found[:most], *([f"and {more} more"] if more > 0 else [])])


def require_layout(inner: Optimizer, saved: Mapping) -> None:
    """Raise ValueError for a saved state that is not of these groups and parameters.

    Where a parameter has state already, the saved one has the same entries, of the same shapes.
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
    return {
        key: tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
        for key, one in sorted(state.items())
    }
