"""Compressors by their specs, as "rank:0.15:natural", which their repr gives back."""

from inspect import Parameter, signature
from typing import Any, TypeAlias

from ef21_muon.checks.renamed import SPECS, renamed_format
from ef21_muon.compressors.base import Compressor, Identity, Quantize
from ef21_muon.compressors.low_rank import QuantizedRank, RankK
from ef21_muon.compressors.rare import Bernoulli, Scaled, TopColumns, TopSingular
from ef21_muon.compressors.sparse import ChunkTopK, RandK, TopK
from ef21_muon.values.specs import NAME, is_option

CLASSES: dict[str, type[Compressor]] = {
    kind.spec[0]: kind
    for kind in (
        *(Identity, Quantize, RankK, QuantizedRank, TopK, RandK, ChunkTopK),
        *(TopColumns, TopSingular, Bernoulli, Scaled),
    )
}
FORMATS = ("values", "basis")  # arguments that are value formats
Argument: TypeAlias = str | float | Compressor


def from_spec(spec: Compressor | str) -> Compressor:
    """Return a compressor from its spec.

    A spec is a name and its arguments, with colons between them; arguments that have a default may
    be left out. A value format alone quantizes every entry.

    Args:
        spec: a spec, for example:

            ====================================  ==================================
            "identity"                            `Identity()`
            "sign", "natural", "quantize:normal2" `Quantize("sign")`, ...
            "rank:0.15:natural"                   `RankK(0.15, "natural")`
            "quantized_rank:0.3:normal4:normal2"  `QuantizedRank(0.3, "normal4", "normal2")`
            "topk:0.05", "randk:0.1:int8"         `TopK(0.05)`, `RandK(0.1, "int8")`
            "chunk_topk:64:64:statistical2"       `ChunkTopK(64, 64, "statistical2")`
            "top_columns:0.1", "top_singular:0.1" `TopColumns(0.1)`, `TopSingular(0.1)`
            "bernoulli:0.5:topk:0.1"              `Bernoulli(TopK(0.1), 0.5)`
            "scaled:0.8:quantize:int2:nearest"    `Scaled(Quantize("int2:nearest"), 0.8)`
            ====================================  ==================================

            Or a compressor, which is returned.

    Returns:
        The compressor; its repr is the shortest spec for it.

    Raises:
        ValueError: for an unknown name, and for arguments that are missing, left over, or out of
            range.

    Example:
        >>> from_spec("rank:0.15:natural")
        rank:0.15:natural
    """
    if isinstance(spec, Compressor):
        return spec
    name, *words = str(spec).split(":")
    kind = CLASSES.get(name)
    if kind is None and NAME.fullmatch(name):
        kind, words = Quantize, [name, *words]
    if kind is None:
        raise ValueError(f"{spec!r} is not a compressor: {_hint(name)}")
    arguments: dict[str, Any] = {}
    taken = signature(kind).parameters
    for parameter in kind.spec[1:]:
        if (given := _take(words, parameter)) is not None:
            arguments[parameter] = given
        elif taken[parameter].default is Parameter.empty:
            raise ValueError(f"{spec!r} lacks its {parameter}: write {_form(kind)}")
    if words:
        raise ValueError(f"{spec!r} has {':'.join(words)!r} left over: write {_form(kind)}")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{spec!r} is not allowed: {error}") from None


def _take(words: list[str], parameter: str) -> Argument | None:
    """Take an argument from the front of the words; return None if it is not there."""
    if not words:
        return None
    if parameter == "compressor":
        rest, words[:] = ":".join(words), []
        return from_spec(rest)
    if parameter in FORMATS:
        taken = [words.pop(0)]
        while words and is_option(words[0]):
            taken.append(words.pop(0))
        return ":".join(taken)
    try:
        number = float(words[0])
    except ValueError:
        return None
    words.pop(0)
    return int(number) if number.is_integer() and parameter in ("k", "chunk") else number


def _form(kind: type[Compressor]) -> str:
    """Return the pattern of a compressor's specs, such as rank:FRACTION[:VALUES]."""
    taken, form = signature(kind).parameters, kind.spec[0]
    for parameter in kind.spec[1:]:
        word = f":{parameter.upper()}"
        form += word if taken[parameter].default is Parameter.empty else f"[{word}]"
    return form


def _hint(name: str) -> str:
    """Return what to give in place of an unknown name."""
    if name in SPECS:
        return f"{name} has been renamed, give {SPECS[name]}"
    return renamed_format(name) or f"choose from {', '.join(map(_form, CLASSES.values()))}"
