"""Specs of compressors and value formats: from a text to an object, and back by its repr."""

import inspect
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import ALWAYS_THE_SAME, seeded

from ef21_muon import compressors, values
from ef21_muon.compressors import (
    Bernoulli,
    ChunkTopK,
    Compressor,
    Identity,
    Quantize,
    QuantizedRank,
    RandK,
    RankK,
    Scaled,
    TopColumns,
    TopK,
    TopSingular,
    from_spec,
)
from ef21_muon.compressors.specs import CLASSES
from ef21_muon.values import (
    BFloat16,
    Float32,
    Integer,
    Natural,
    NaturalWindow,
    Normal,
    RowColumn,
    SignScale,
    Statistical,
    ValueFormat,
    value_format,
)

ROUNDINGS = st.sampled_from(["stochastic", "nearest"])
OF_A_MATRIX = st.sampled_from(["row", "tensor"])
BLOCKS = OF_A_MATRIX | st.integers(1, 40) | st.integers(1, 9).map("{}blocks".format)
FORMATS = st.one_of(
    st.builds(Float32),
    st.builds(BFloat16),
    st.builds(Natural, ROUNDINGS),
    st.builds(NaturalWindow, st.integers(3, 7), ROUNDINGS, BLOCKS),
    st.builds(Integer, st.integers(2, 8), ROUNDINGS, BLOCKS),
    st.builds(SignScale, BLOCKS),
    st.builds(RowColumn, st.integers(2, 8), ROUNDINGS),
    st.builds(Normal, st.integers(1, 6), OF_A_MATRIX),
    st.builds(Statistical, st.integers(2, 8), OF_A_MATRIX, st.floats(0.1, 20) | st.integers(1, 20)),
)
SHARES = st.floats(0, 1, exclude_min=True) | st.just(1)
PLAIN = st.one_of(
    st.builds(Identity),
    st.builds(Quantize, FORMATS),
    *(st.builds(kind, SHARES, FORMATS) for kind in (RankK, TopK, RandK, TopColumns, TopSingular)),
    st.builds(QuantizedRank, SHARES, FORMATS, FORMATS),
    st.builds(ChunkTopK, st.integers(1, 9), st.integers(3, 9), FORMATS),
)


def has_a_default_scale(compressor):
    return compressor.values.unbiased and not isinstance(compressor, QuantizedRank)


SCALED = st.builds(Scaled, PLAIN, SHARES) | st.builds(Scaled, PLAIN.filter(has_a_default_scale))
ANY = st.recursive(PLAIN | SCALED, lambda inner: st.builds(Bernoulli, inner, SHARES), max_leaves=2)


def alike(one, other):
    """Whether two objects have the same attributes, apart from 5 and 5.0."""
    mine, theirs = vars(one), vars(other)
    equal = (v == theirs[k] or repr(v) == repr(theirs[k]) for k, v in mine.items())
    return mine.keys() == theirs.keys() and all(equal)


def test_every_class_is_drawn():
    """Those of the modules, but the base classes."""
    public = {getattr(compressors, name) for name in compressors.__all__}
    assert set(CLASSES.values()) == {one for one in public if isinstance(one, type)} - {Compressor}
    for strategy, module, base in ((ANY, compressors, Compressor), (FORMATS, values, ValueFormat)):
        text = repr(strategy)
        names = {n for n in module.__all__ if isinstance(getattr(module, n), type)}
        assert {n for n in names if n not in text} <= {base.__name__}


@ALWAYS_THE_SAME
@given(FORMATS)
def test_the_repr_of_a_format_gives_it_back(format_):
    again = value_format(repr(format_))
    assert repr(again) == str(again) == repr(format_) and alike(again, format_)
    x = torch.randn(2, 6, 10, generator=seeded(1))
    assert torch.equal(again.encode(x, seeded()), format_.encode(x, seeded()))


@ALWAYS_THE_SAME
@given(ANY)
def test_the_repr_gives_it_back(compressor):
    again = from_spec(repr(compressor))
    assert repr(again) == repr(compressor) and str(again) == str(compressor)
    assert alike(again, compressor)
    assert " " not in repr(compressor)
    x = torch.randn(2, 6, 10, generator=seeded(1))
    for one, other in ((compressor, again), (compressor.fit(6, 10), again.fit(6, 10))):
        message = one.encode(x, seeded())
        assert torch.equal(message, other.encode(x, seeded()))
        assert torch.equal(one.decode(message, 6, 10), other.decode(message, 6, 10))


def test_a_compressor_is_its_own_spec():
    compressor = TopK(0.1)
    assert from_spec(compressor) is compressor
    assert value_format(compressor.values) is compressor.values


def rows(text):
    """Of a docstring's table, the specs and the expressions of each row."""
    for line in inspect.cleandoc(text).splitlines():
        if built := re.findall(r"`([^`]+\))`", line):
            yield re.findall(r'"([^"]+)"', line[: line.index("`")]), built


TABLE = [row for row in rows(from_spec.__doc__ or "") if row[0]]


@pytest.mark.skipif(not from_spec.__doc__, reason="Python runs without docstrings")
def test_examples_of_the_docstring():
    seen = set()
    for specs, built in TABLE:
        for spec in specs:
            seen.add(type(from_spec(spec)))
        for spec, call in zip(specs, built, strict=False):
            expected = eval(call, vars(compressors))
            assert repr(from_spec(spec)) == repr(expected) and type(from_spec(spec)) is type(
                expected
            )
    assert seen == set(CLASSES.values())


@pytest.mark.parametrize("module", [compressors, values], ids=lambda module: module.__name__)
@pytest.mark.skipif(not from_spec.__doc__, reason="Python runs without docstrings")
def test_the_table_of_the_package(module):
    """A spec and its class in every row, and every class in one."""
    table = re.findall(r"^    ([a-z]\S+) +(\w+) ", module.__doc__, re.MULTILINE)
    build = from_spec if module is compressors else value_format
    for spec, kind in table[1:]:
        assert type(build(spec.replace("...", "identity"))) is getattr(module, kind)
    named = {kind for _, kind in table[1:]}
    bases = {"Compressor", "ValueFormat"}
    assert named == {n for n in module.__all__ if isinstance(getattr(module, n), type)} - bases


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("quantize:natural", "natural"),
        ("quantize:sign", "sign"),
        ("quantize:float32", "identity"),
        ("quantize", "identity"),
        ("float32", "identity"),
        ("int4", "quantize:int4"),
        ("int4:stochastic", "quantize:int4"),
        ("sign@row", "sign"),
        ("statistical2@tensor", "quantize:statistical2"),
        ("statistical2:span=6", "quantize:statistical2"),
        ("topk:5e-2:float32", "topk:0.05"),
        ("topk:1", "topk:1.0"),
        ("chunk_topk", "chunk_topk"),
        ("chunk_topk:64:64", "chunk_topk"),
        ("chunk_topk:natural", "chunk_topk:64:64:natural"),
        ("quantized_rank:0.3:normal4:normal2", "quantized_rank:0.3"),
        ("quantized_rank:0.3:int4:nearest:int2", "quantized_rank:0.3:int4:nearest:int2"),
        ("bernoulli:topk:0.1", "bernoulli:0.5:topk:0.1"),
        ("bernoulli:0.2:scaled:0.8:int2", "bernoulli:0.2:scaled:0.8:quantize:int2"),
        ("scaled:randk:0.1:int2", "scaled:randk:0.1:int2"),
    ],
)
def test_the_shortest_spec(spec, same):
    assert repr(from_spec(spec)) == same and repr(from_spec(same)) == same


@pytest.mark.parametrize(
    ("spec", "given_and_allowed"),
    [
        ("", ("''", "choose from identity, quantize[:VALUES], rank:FRACTION[:VALUES]")),
        ("TopK:0.1", ("'TopK:0.1'", "topk:FRACTION[:VALUES]")),
        (None, ("None is not a compressor", "bernoulli[:PROBABILITY]:COMPRESSOR")),
        ("rank", ("'rank' lacks its fraction", "write rank:FRACTION[:VALUES]")),
        ("rank:natural", ("'rank:natural' lacks its fraction", "write rank:FRACTION[:VALUES]")),
        ("rank:15%", ("'rank:15%' lacks its fraction", "write rank:FRACTION[:VALUES]")),
        ("rank:2", ("RankK got fraction=2.0", "a number above 0, at most 1")),
        ("topk:nan", ("TopK got fraction=nan", "a number above 0, at most 1")),
        ("rank:0.1:natural:3", ("'3' left over", "write rank:FRACTION[:VALUES]")),
        ("identity:0.1", ("'0.1' left over", "write identity")),
        ("rank:0.1:foo", ("values=foo", "float32, bfloat16, natural, natural3 to natural7, int2")),
        ("quantize:", ("values=", "choose from float32")),
        ("int9", ("bits=9", "2 to 8")),
        ("natural8", ("exponent_bits=8", "3 to 7")),
        ("normal4@7", ("block=7", "row or tensor")),
        ("int4@0", ("block=0", "a number of values above 0, or of blocks as 8blocks")),
        ("natural@row", ("values=natural@row does not take block=row", "choose from")),
        ("sign:nearest", ("values=sign does not take rounding=nearest", "choose from")),
        ("int2:size=3", ("does not take size=3", "choose from")),
        ("int2:rounding=up", ("rounding=up", "nearest or stochastic")),
        ("int2:nearest:stochastic", ("int2:nearest:stochastic has an option twice", "give each")),
        ("chunk_topk:1.5", ("k=1.5", "a whole number above 0, at most chunk^2")),
        ("chunk_topk:64:3", ("k=64", "a whole number above 0, at most chunk^2")),
        ("bernoulli:0.5", ("lacks its compressor", "bernoulli[:PROBABILITY]:COMPRESSOR")),
        ("bernoulli:2:identity", ("probability=2.0", "a number above 0, at most 1")),
        ("bernoulli:0.5:topk", ("'topk' lacks its fraction", "write topk:FRACTION[:VALUES]")),
        ("scaled:sign", ("Scaled has no default scale for sign", "give one")),
        ("scaled:0.5:scaled:0.5:int2", ("scaled 0.5 quantize int2", "scale the one inside")),
    ],
)
def test_bad_specs(spec, given_and_allowed):
    """One line: what was given, and what is allowed."""
    with pytest.raises(ValueError) as refused:
        from_spec(spec)
    said = str(refused.value)
    assert all(words in said for words in given_and_allowed) and "\n" not in said


class Corner(Compressor):
    """A compressor of a user, without a spec."""

    def __init__(self, side: int, values: ValueFormat | str = "float32"):
        super().__init__(values)
        self.side = side


class Half(TopK):
    """One that has the spec of another class, which would not give it back."""

    def __init__(self):
        super().__init__(0.5, "natural")


def test_the_repr_of_a_class_without_a_spec():
    assert repr(Corner(3, "int4")) == "Corner(values=int4, side=3)"
    assert repr(Half()) == "Half(values=natural, fraction=0.5)"
    assert repr(Bernoulli(Half(), 0.2)) == "bernoulli:0.2:Half(values=natural, fraction=0.5)"
    assert str(Half()) == "top 50% natural"


@pytest.mark.parametrize(
    ("mapping", "spec"),
    [
        ({"format": "int5", "rounding": "nearest"}, "int5:nearest"),
        ({"format": "int5", "rounding": "stochastic", "block": 128}, "int5@128"),
        ({"format": "statistical4", "span": 5, "block": "row"}, "statistical4@row:span=5"),
    ],
)
def test_a_format_from_a_mapping(mapping, spec):
    assert repr(value_format(mapping)) == spec == repr(value_format(spec))
