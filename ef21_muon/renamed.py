"""Names of earlier versions: each is refused in one line that says the new one."""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

# Arguments of constructors, and entries of parameter groups.
ARGUMENTS = {
    "beta": "momentum, which is 1 - beta",
    "momentum_start": "momentum_init",
    "missing": "missing_grad",
    "every": "sync_every",
    "stagger": "streaming",
    "delay": "sync_delay",
    "kernels": "conv_scaling",
    "stochastic": "rounding: 'stochastic' or 'nearest'",
    "worker_size": "ranks_per_worker",
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
}
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
    """A name of an earlier version was given: a TypeError, as for any unknown argument.

    And a ValueError, as for any other option that is refused.
    """


def refuse_renamed(where: str, given: Mapping[str, object]) -> None:
    """Raise RenamedError where an argument has a name of an earlier version.

    Args:
        where: what was given these arguments, for the error.
        given: arguments, or entries of a parameter group, by name.
    """
    for name, value in given.items():
        if name in ARGUMENTS:
            new = ARGUMENTS[name]
            if name == "beta" and isinstance(value, float | int):
                new = f"momentum={1 - value:g}, which is 1 - beta"
            raise RenamedError(f"{where}: {name}={value} has been renamed, give {new}")


def refuses_renamed(init: Callable[Given, Result]) -> Callable[Given, Result]:
    """Have a constructor refuse the arguments of earlier versions."""

    @wraps(init)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        refuse_renamed(type(args[0]).__name__, kwargs)
        return init(*args, **kwargs)

    return checked


def renamed_value(name: str, value: object) -> str:
    """What replaces a value of an earlier version, for an error; empty where nothing does."""
    new = VALUES.get((name, value)) if isinstance(value, str) else None
    return f"it has been renamed, give {new}" if new else ""


def renamed_format(name: str) -> str:
    """What replaces a value format of an earlier version; empty where nothing does."""
    new = re.sub("^smooth", "rowcol", name).replace("@message", "@tensor")
    return f"it has been renamed, give {new}" if new != name else ""
