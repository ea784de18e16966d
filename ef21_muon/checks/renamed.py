"""Names of earlier versions: each is refused in one line that says the new one."""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

# Arguments of constructors, and entries of parameter groups.
ARGUMENTS = {
    "beta": "momentum",  # which is 1 - beta
    "momentum_start": "momentum_init",
    "missing": "missing_grad",
    "every": "sync_every",
    "stagger": "streaming",
    "delay": "sync_delay",
    "kernels": "conv_scaling",
    "stochastic": "rounding",  # "stochastic" or "nearest"
    "worker_size": "ranks_per_worker",
}
# Arguments of other optimizers, and what they are here.
FOREIGN = {
    "betas": "momentum, and AveragedGradients(torch.optim.AdamW(...)) for AdamW's steps",
    "H": "sync_every",
    "ns_steps": "norm=Spectral(steps=...)",
    "rank": "w2s='rank:FRACTION'",
    "compressor": "w2s, and s2w for the way back",
    "optimizer": "inner",
}
# Values of arguments.
VALUES = {
    ("first_message", "exact"): "first_message='full'",
    ("missing_grad", "refuse"): "missing_grad='error'",
    ("block", "message"): "block='tensor'",
    **{("momentum", kind): f"momentum_kind={kind!r}" for kind in ("polyak", "mvr", "hessian")},
}
# Attributes of optimizers.
ATTRIBUTES = {
    "agreed": "global_params",
    "finish": "final_sync",
    "delay": "sync_delay",
    "stagger": "streaming",
    "missing": "missing_grad",
    "momentum": "momentum_kind",
    "momentum_start": "momentum_init",
    "roll_call": "stragglers",
    "go_on_after": "resume_after",
}
# Classes, and where they are in `ef21_muon` today.
CLASSES = {
    "FittedRank": "compressors.QuantizedRank",
    "Dense": "compressors.Quantize",
    "Dropout": "compressors.Bernoulli",
    "Damping": "compressors.Scaled",
    "Values": "values.ValueFormat",
    "SmoothnessAware": "values.RowColumn",
}
# Specs of compressors.
SPECS = {
    "fitted_rank": "quantized_rank",
    "dense": "quantize",
    "dropout": "bernoulli",
    "damping": "scaled",
}

Given = ParamSpec("Given")
Result = TypeVar("Result")


class RenamedError(TypeError, ValueError):
    """A name of an earlier version, or of another optimizer, was given.

    It is a TypeError, as for any unknown argument, and a ValueError, as for any option that is
    refused.
    """


def refuse_renamed(where: str, given: Mapping[str, object]) -> None:
    """Raise RenamedError if an argument has the name of an earlier version.

    Args:
        where: what takes the arguments, for the error.
        given: arguments, or entries of a parameter group, by name.
    """
    for name, value in given.items():
        if name in ARGUMENTS:
            new = _in_new_words(name, value)
            raise RenamedError(f"{where}: {name}={value} has been renamed, give {new}")
        if name in FOREIGN:
            raise RenamedError(f"{where} has no {name}: give {FOREIGN[name]}")


def _in_new_words(name: str, value: object) -> str:
    """Return an argument of an earlier version in today's words: "momentum=0.9"."""
    new = ARGUMENTS[name]
    if name == "beta":
        if isinstance(value, float | int):
            return f"momentum={1 - value:g}, which is 1 - beta"
        return "momentum, 1 - beta"
    if name == "stochastic":
        return f"rounding={'stochastic' if value else 'nearest'!r}"
    if isinstance(value, str) and (new, value) in VALUES:
        return VALUES[new, value]
    return f"{new}={value!r}"


def refuses_renamed(init: Callable[Given, Result]) -> Callable[Given, Result]:
    """Make a constructor refuse the arguments of earlier versions."""

    @wraps(init)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        refuse_renamed(type(args[0]).__name__, kwargs)
        return init(*args, **kwargs)

    return checked


def renamed_value(name: str, value: object) -> str:
    """Return what replaces a value of an earlier version, for an error; empty if it is not one."""
    new = VALUES.get((name, value)) if isinstance(value, str) else None
    return f"it has been renamed, give {new}" if new else ""


def renamed_format(name: str) -> str:
    """Return what replaces a value format of an earlier version; empty if it is not one."""
    new = modern_format(name)
    return f"it has been renamed, give {new}" if new != name else ""


def modern_format(name: str) -> str:
    """Return the name of a value format of any version as it is today."""
    return re.sub("^smooth", "rowcol", name).replace("@message", "@tensor")
