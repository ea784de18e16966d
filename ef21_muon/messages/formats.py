"""Value formats by the names that configurations write."""

import re
from collections.abc import Mapping

from ef21_muon.messages.levels import Normal, Statistical
from ef21_muon.messages.scaled import Integer, NaturalWindow, SignScale, SmoothnessAware
from ef21_muon.messages.values import BFloat16, Float32, Natural, Values

NAMES = (
    "float32, bfloat16, natural, natural3 to natural7, int2 to int8, normal1 to normal6, sign, "
    "smooth2 to smooth8, statistical2 to statistical8"
)
FORMATS = {"float32": Float32, "bfloat16": BFloat16, "natural": Natural, "sign": SignScale}
OF_BITS = {"int": Integer, "normal": Normal, "smooth": SmoothnessAware, "statistical": Statistical}


def value_format(values: Values | str | Mapping) -> Values:
    """A format from what configurations write; a format is returned as it is.

    A name, with the bits of a window, of integers or of levels behind it and a block behind
    @ ("natural4", "int4@128", "int4@8blocks", "sign@message"), or a mapping with such a `format`
    and further options ({format: natural4, stochastic: false}). Raises ValueError for anything
    else.
    """
    if isinstance(values, Values):
        return values
    options = dict(values) if isinstance(values, Mapping) else {"format": values}
    name = str(options.pop("format", None))
    match = re.fullmatch(rf"({'|'.join(FORMATS | OF_BITS)})(\d?)(?:@(\w+))?", name)
    if not match or (match[1] in OF_BITS) > bool(match[2]):
        raise ValueError(f"values={name} is not a value format: choose from {NAMES}")
    kind, bits, block = match.groups()
    if block:
        options["block"] = int(block) if block.isdigit() else block
    if bits:
        options["exponent_bits" if kind == "natural" else "bits"] = int(bits)
    try:
        windows = {"natural": NaturalWindow} if bits else {}
        return (FORMATS | OF_BITS | windows)[kind](**options)
    except TypeError:
        told = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"values={kind} does not take {told}: choose from {NAMES}") from None
