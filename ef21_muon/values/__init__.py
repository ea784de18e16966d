"""Value formats, in which compressors write the numbers of a message.

Build one, or give its spec, such as "natural" or "int4@128:nearest" (`value_format`): a name with
its bits, then the block of values that share a scale after @, and options after colons.

    spec            class               bits per value
    float32         Float32             32, exact
    bfloat16        BFloat16            16
    natural         Natural             9, powers of two, unbiased
    natural4        NaturalWindow       1 + 4, powers of two in a window, unbiased
    int4            Integer             4, multiples of a scale, unbiased
    rowcol4         RowColumn           4, with scales for rows and for columns, unbiased
    normal4         Normal              4, EDEN's levels for normal values
    statistical4    Statistical         4, means of bins
    sign            SignScale           1
"""

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
