"""Value formats: how the numbers of a message are written, as objects or by name: "int4@128"."""

from ef21_muon.values.base import BFloat16, Float32, Natural, ValueFormat
from ef21_muon.values.levels import Normal, Statistical
from ef21_muon.values.scaled import Integer, NaturalWindow, RowColumn, SignScale
from ef21_muon.values.specs import value_format

__all__ = [
    "BFloat16",
    "Float32",
    "Integer",
    "Natural",
    "NaturalWindow",
    "Normal",
    "RowColumn",
    "SignScale",
    "Statistical",
    "ValueFormat",
    "value_format",
]
