"""Value formats from their specs, as configurations and the specs of compressors write them."""

import re
from collections.abc import Mapping

from ef21_muon.checks.renamed import refuse_renamed, renamed_format
from ef21_muon.values.base import BFloat16, Float32, Natural, ValueFormat
from ef21_muon.values.levels import Normal, Statistical
from ef21_muon.values.scaled import Integer, NaturalWindow, RowColumn, SignScale

NAMES = (
    "float32, bfloat16, natural, natural3 to natural7, int2 to int8, normal1 to normal6, sign, "
    "rowcol2 to rowcol8, statistical2 to statistical8"
)
FORMATS = {"float32": Float32, "bfloat16": BFloat16, "natural": Natural, "sign": SignScale}
OF_BITS = {
    **{"natural": NaturalWindow, "int": Integer, "normal": Normal},
    **{"rowcol": RowColumn, "statistical": Statistical},
}
NAME = re.compile(rf"({'|'.join(FORMATS | OF_BITS)})(\d?)(?:@(\w+))?")


def value_format(values: ValueFormat | str | Mapping) -> ValueFormat:
    """Return a value format from its spec.

    A spec is the name with its bits, then a block after @, then options after colons.

    Args:
        values: a spec: "natural4", "int4@128", "int4@8blocks", "sign@tensor", "int5:nearest" or
            "statistical4:span=5", for example. Or a mapping of `format` and options, such as
            {"format": "int5", "rounding": "nearest"}. Or a value format, which is returned.

    Returns:
        The value format; its repr is the shortest spec for it.

    Raises:
        ValueError: for any other name, and for an option that the format does not have.

    Example:
        >>> value_format("int4@128:nearest")
        int4@128:nearest
    """
    if isinstance(values, ValueFormat):
        return values
    given = dict(values) if isinstance(values, Mapping) else {"format": values}
    name, *words = str(given.pop("format", None)).split(":")
    options = dict(map(_option, words)) | given
    if len(options) < len(words) + len(given):
        raise ValueError(f"values={values} has an option twice: give each of them once")
    refuse_renamed("values", options)
    match = NAME.fullmatch(name)
    kind, bits, block = match.groups() if match else (None, "", None)
    format_ = (OF_BITS if bits else FORMATS).get(kind or "")
    if format_ is None or block == "message":
        hint = renamed_format(name) or f"choose from {NAMES}"
        raise ValueError(f"values={name} is not a value format: {hint}")
    if block:
        options["block"] = int(block) if block.isdecimal() else block
    try:
        return format_(*map(int, bits), **options)
    except TypeError:
        text = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"values={name} does not take {text}: choose from {NAMES}") from None


def is_option(word: str) -> bool:
    """Return whether a word of a spec is an option of the value format before it."""
    return word in ("nearest", "stochastic") or "=" in word


def _option(word: str) -> tuple[str, object]:
    """Return ("rounding", "nearest") for "nearest", and ("span", 5.0) for "span=5"."""
    key, separator, value = word.partition("=")
    if not separator:
        return "rounding", key
    try:
        return key, float(value)
    except ValueError:
        return key, value
