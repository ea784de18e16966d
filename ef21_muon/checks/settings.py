"""Checks of the optimizers' options: their ranges, and the compressors of parameter groups."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from math import isfinite
from typing import TypeAlias, TypeGuard

from torch import Tensor

from ef21_muon.checks.renamed import refuse_renamed, renamed_value
from ef21_muon.compressors import Compressor, from_spec
from ef21_muon.norms.lmo import AdaptiveRadius, Norm

# One for all parameter groups, or one per group by the group's name.
Compressors: TypeAlias = Compressor | str | Mapping[str, Compressor | str]

# By the option's name, the range in words and whether a number is in it.
Ranges: TypeAlias = dict[str, tuple[str, Callable[[float], bool]]]
NUMBERS: Ranges = {
    "lr": ("of at least 0", lambda lr: lr >= 0),
    "radius": ("above 0, or an AdaptiveRadius", lambda radius: radius > 0),
    "momentum": ("of at least 0, below 1", lambda momentum: 0 <= momentum < 1),
    "error_decay": ("of at least 0, at most 1", lambda decay: 0 <= decay <= 1),
    "server_momentum": ("of at least 0, below 1", lambda momentum: 0 <= momentum < 1),
    "weight_decay": ("of at least 0", lambda weight_decay: weight_decay >= 0),
}
FLAGS = ("nesterov", "transposed", "conv_scaling", "lmo_feedback")
# What a parameter group may have; other entries are the user's own, unless they look like these.
SCHEDULED = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")  # of schedulers
OPTIONS = {"params", "param_names", "name", "norm", "w2s", "s2w", *NUMBERS, *FLAGS, *SCHEDULED}
OUTER_NUMBERS: Ranges = {
    "outer_lr": ("above 0", lambda outer_lr: outer_lr > 0),
    "outer_momentum": ("of at least 0, below 1", lambda momentum: 0 <= momentum < 1),
    "error_decay": NUMBERS["error_decay"],
}


def plain(value: object) -> object:
    """Convert a tensor with one entry, or a NumPy number, to a Python number.

    Anything else is returned as it is. Waits for the device of a tensor.
    """
    if hasattr(value, "item"):
        with suppress(RuntimeError, TypeError, ValueError):  # of many entries, or without values
            return value.item()
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number; True and False are not."""
    return isinstance(value, float | int) and not isinstance(value, bool) and isfinite(value)


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Check that an option has one of the values that are allowed.

    Args:
        name: of the option, for the error.
        value: that was given.
        allowed: the values that are allowed.

    Returns:
        The value.

    Raises:
        ValueError: for any other value.
    """
    allowed = [*allowed]
    if value not in allowed:
        hint = renamed_value(name, value) or f"choose {', '.join(allowed)}"
        raise ValueError(f"{name}={value!r} is not allowed: {hint}")
    return value


def check_number(name: str, value: object, ranges: Ranges, where: str = "") -> float:
    """Check that an option is a finite number in its range.

    Args:
        name: of the option.
        value: that was given, which may be a tensor with one entry.
        ranges: of the options, by name.
        where: the parameter group, for the error.

    Returns:
        The number, as `plain` converts it.

    Raises:
        ValueError: for any other value.
    """
    range_, holds = ranges[name]
    number = plain(value)
    if is_number(number) and holds(number):
        return number
    given = f"a tensor of shape {tuple(number.shape)}" if isinstance(number, Tensor) else number
    given = repr(number) if isinstance(number, str) else given
    hint = renamed_value(name, number) or f"give a number {range_}{where}"
    raise ValueError(f"{name}={given} is not allowed: {hint}")


def whole_number(name: str, value: object, least: int) -> int:
    """Check that an option is a whole number of at least `least`.

    Args:
        name: of the option, for the error.
        value: that was given, which may be a tensor with one entry.
        least: the smallest number that is allowed.

    Returns:
        The number, as `plain` converts it.

    Raises:
        ValueError: for any other value.
    """
    number = plain(value)
    if type(number) is int and number >= least:
        return number
    range_ = "above 0" if least == 1 else f"of at least {least}"
    given = repr(number) if isinstance(number, str) else number
    raise ValueError(f"{name}={given} is not allowed: give a whole number {range_}")


def flag(name: str, value: bool) -> bool:
    """Return the value; raise ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not allowed: give True or False")
    return value


def check_group(group: dict) -> None:
    """Check a parameter group of EF21Muon, and convert its numbers and compressors in place.

    Numbers become Python numbers, except an lr that is a tensor, since schedulers may write into
    it. Specs of compressors become compressors.

    Args:
        group: the parameter group, with all entries.

    Raises:
        ValueError: for an entry that is out of its range.
    """
    refuse_renamed(f"a parameter group{_where(group)}", group)
    for entry in group.keys() - OPTIONS:
        if near := get_close_matches(entry, OPTIONS, n=1, cutoff=0.75):
            raise ValueError(f"a group has no {entry!r}: did you mean {near[0]!r}?{_where(group)}")
    for name in NUMBERS:
        if not (name == "radius" and isinstance(group[name], AdaptiveRadius)):
            number = check_number(name, group[name], NUMBERS, _where(group))
            if not (name == "lr" and isinstance(group[name], Tensor)):
                group[name] = number
    for name in FLAGS:
        flag(name, group[name])
    if group["lmo_feedback"] and isinstance(group["radius"], AdaptiveRadius):
        raise ValueError(
            f"radius={group['radius']} is not allowed with lmo_feedback=True, whose steps are as "
            f"long as gradients are: give a number{_where(group)}"
        )
    _require_kind("norm", group["norm"], Norm, _where(group))
    check_compressors(group)


def check_compressors(group: dict) -> None:
    """Replace the specs of compressors in a parameter group by compressors.

    Args:
        group: with the entries "w2s" and "s2w".

    Raises:
        ValueError: for an entry that is neither a compressor nor a spec of one.
    """
    for way in ("w2s", "s2w"):
        group[way] = compressor_of(way, group[way], _where(group))


def compressor_of(name: str, given: Compressor | str, where: str = "") -> Compressor:
    """The compressor that is given, or whose spec is. Raises ValueError for anything else."""
    if isinstance(given, str):
        try:
            return from_spec(given)
        except ValueError as error:
            raise ValueError(f"{name}={error}{where}") from None
    _require_kind(name, given, Compressor, where)
    return given


def _require_kind(name: str, given: object, kind: type, where: str) -> None:
    if not isinstance(given, kind):
        module = "norms" if kind is Norm else "compressors"
        spec = ", or a spec as 'topk:0.05'" if kind is Compressor else ""
        raise ValueError(
            f"{name}={given!r} is not allowed: give an object of ef21_muon.{module}{spec}{where}"
        )


def _where(group: dict) -> str:
    return f" (group {group['name']})" if "name" in group else ""


def check_mean(mean: str, feedback: str) -> str:
    """Check the `mean` of LocalSteps.

    Args:
        mean: "all" or "senders".
        feedback: "ef21", "ef14" or "none".

    Returns:
        `mean`.

    Raises:
        ValueError: for any other `mean`, or for one that does not go with the feedback.
    """
    if choice("mean", mean, ("all", "senders")) == "senders" and feedback == "ef21":
        raise ValueError(
            f"mean={mean!r} is not allowed with feedback={feedback!r}, whose servers add up means "
            "over all workers: give feedback='ef14' or 'none', or mean='all'"
        )
    return mean


def refuse_compressed_shifts(groups: Iterable[dict]) -> None:
    """Raise ValueError for an s2w compressor with server="replicated", which sends nothing back."""
    for group in groups:
        if not group["s2w"].lossless:
            raise ValueError(
                f"server='replicated' sends nothing back to compress with s2w={group['s2w']}: "
                "use s2w=identity, or server=sharded or rank0"
            )


def refuse_unused_decays(groups: list[dict], feedback: str) -> None:
    """Raise ValueError for an error decay or server momentum that the feedback does not use.

    Args:
        groups: parameter groups with the entries "error_decay" and "server_momentum".
        feedback: "ef21", "ef14" or "none".
    """
    unused = {"ef21": {"error_decay": 1, "server_momentum": 0}, "none": {"error_decay": 1}}
    for name, neutral in unused.get(feedback, {}).items():
        for group in groups:
            if group[name] != neutral:
                raise ValueError(
                    f"{name}={group[name]} is not allowed with feedback={feedback!r}: leave it at "
                    f"{neutral}, or use feedback='ef14'"
                )


def rule_of(group: dict, w2s: Compressors, s2w: Compressors) -> dict:
    """A parameter group's parameters and compressors.

    Args:
        group: the parameter group.
        w2s: the compressors to the servers.
        s2w: the compressors back.

    Returns:
        A group with the entries "params", "w2s", "s2w" and, if there are any, "param_names",
        "name" and "transposed".

    Raises:
        ValueError: if there is no compressor for this group, or if it is none.
    """
    entries = ("params", "param_names", "name", "transposed")
    rule = {key: group[key] for key in entries if key in group}
    for direction, given in (("w2s", w2s), ("s2w", s2w)):
        if isinstance(given, Mapping):
            if group.get("name") not in given:
                which = (
                    f"the group {group['name']!r}" if "name" in group else "a group without name"
                )
                raise ValueError(
                    f"{direction} has compressors for {', '.join(given)}, and none for {which}: "
                    "give every group an entry 'name', and a compressor for it"
                )
            given = given[group["name"]]
        rule[direction] = given
    check_compressors(rule)
    return rule
