"""Every compressor in every value format. Random draws are seeded: a run never differs from the
last one. Statistical bounds allow 6 standard deviations of a mean (a false alarm in 10^9, should
the generator of torch change)."""

from itertools import product

import numpy as np
import pytest
import reference
import torch
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import ALWAYS_THE_SAME, batches, lost, seeded

from ef21_muon.compressors import (
    ChunkTopK,
    Identity,
    Quantize,
    QuantizedRank,
    RandK,
    RankK,
    TopColumns,
    TopK,
    TopSingular,
)
from ef21_muon.values import (
    BFloat16,
    Float32,
    Integer,
    Natural,
    NaturalWindow,
    Normal,
    SignScale,
    Statistical,
)

FORMATS = {
    "float32": Float32(),
    "bfloat16": BFloat16(),
    "natural": Natural(),
    "nearest": Natural(rounding="nearest"),
    "window": NaturalWindow(4),
    "narrow window": NaturalWindow(3, block=16),
    "nearest window": NaturalWindow(4, rounding="nearest"),
    "int8": Integer(8, block=100),
    "int4": Integer(4),
    "nearest int4": Integer(4, rounding="nearest"),
    "normal1": Normal(1),
    "normal5": Normal(5, block="tensor"),
    "sign": SignScale(),
    "sign by block": SignScale(7),
    "statistical2": Statistical(2),
    "statistical8 by row": Statistical(8, block="row"),
}
REFERENCE_ROUNDING = {
    "float32": reference.float32,
    "bfloat16": reference.bfloat16,
    "nearest": reference.natural,
}
FRACTIONS = {
    "topk": TopK,
    "rank": RankK,
    "random": RandK,
    "columns": TopColumns,
    "singular": TopSingular,
    "quantized rank": QuantizedRank,
}
KINDS = {"chunks": lambda _, values: ChunkTopK(5, 6, values), **FRACTIONS}
# Every format alone and in two of the kinds in turn, and every fraction.
COMPRESSORS = {"identity": Identity()}
for place, (format_name, values) in enumerate(FORMATS.items()):
    COMPRESSORS[f"quantize {format_name}"] = Quantize(values)
    for kind in [*KINDS, *KINDS][2 * place % len(KINDS) :][:2]:
        COMPRESSORS[f"{kind} {format_name}"] = KINDS[kind](0.3, values)
for kind, make in FRACTIONS.items():
    COMPRESSORS[f"{kind} 0.05"] = make(0.05, Natural())
    COMPRESSORS[f"{kind} 1.0"] = make(1.0, Float32())

COMPRESSORS["quantize int4@3blocks"] = Quantize("int4@3blocks")
COMPRESSORS["quantize rowcol4"] = Quantize("rowcol4")
COMPRESSORS["quantize nearest rowcol3"] = Quantize({"format": "rowcol3", "rounding": "nearest"})

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)


def is_random(compressor):
    sketched = isinstance(compressor, RankK | RandK | QuantizedRank)
    return sketched or compressor.values.rounding == "stochastic"


@every_compressor
@settings(ALWAYS_THE_SAME, max_examples=6)
@given(x=batches(), seed=st.integers(0, 99))
def test_messages_have_their_size_and_come_back_in_shape(compressor, x, seed):
    layers, m, n = x.shape
    before = x.clone()
    payload = compressor.encode(x, seeded(seed))
    decoded = compressor.decode(payload, m, n)
    assert torch.equal(x, before)
    assert payload.dtype == torch.uint8
    assert payload.shape == (layers, compressor.payload_bytes(m, n))
    assert decoded.dtype == torch.float32
    assert decoded.shape == x.shape
    assert decoded.isfinite().all()
    assert not decoded[(x == 0).all((1, 2))].any(), "zeros stay zero"
    assert torch.equal(compressor.encode(x, seeded(seed)), payload)
    if compressor.lossless:
        assert torch.equal(decoded, x)


@pytest.mark.parametrize(
    "compressor",
    [c for c in COMPRESSORS.values() if not is_random(c)],
    ids=[name for name, c in COMPRESSORS.items() if not is_random(c)],
)
@settings(ALWAYS_THE_SAME, max_examples=8)
@given(x=batches())
def test_deterministic_compressors_contract(compressor, x):
    m, n = x.shape[1:]
    bound = 1 - compressor.alpha(m, n)
    assert 0 <= bound <= 1
    assert (lost(compressor.decode(compressor.encode(x), m, n), x) <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    "compressor",
    [c for c in COMPRESSORS.values() if is_random(c)],
    ids=[name for name, c in COMPRESSORS.items() if is_random(c)],
)
@settings(ALWAYS_THE_SAME, max_examples=5)
@given(x=batches())
def test_random_compressors_contract_in_expectation(compressor, x):
    """Over 256 draws of one matrix, which are one batch. 1e-6 is the rounding of factors."""
    m, n = x.shape[1:]
    draws = x[:1].expand(256, m, n)
    losses = lost(compressor.decode(compressor.encode(draws, seeded()), m, n), draws)
    bound = 1 - compressor.alpha(m, n)
    assert bound >= 0
    assert losses.mean() <= bound + 6 * losses.std() / 16 + 1e-6


@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0])
@settings(ALWAYS_THE_SAME, max_examples=12)
@given(x=batches(), seed=st.integers(0, 99))
def test_rank_never_adds_whatever_the_sketch(fraction, x, seed):
    m, n = x.shape[1:]
    compressor = RankK(fraction)
    assert (lost(compressor.decode(compressor.encode(x, seeded(seed)), m, n), x) < 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["bfloat16", "nearest"])
@settings(ALWAYS_THE_SAME, max_examples=12)
@given(x=batches(), seed=st.integers(0, 99))
def test_rank_in_biased_formats_does_not_blow_up(name, x, seed):
    """Each factor is off by a share sqrt(omega) of its norm, sqrt(r) and at most ||x||."""
    m, n = x.shape[1:]
    compressor = RankK(0.3, FORMATS[name])
    decoded = compressor.decode(compressor.encode(x, seeded(seed)), m, n)
    off, rank = FORMATS[name].omega(1, 1) ** 0.5, compressor.kept(min(m, n))
    assert (lost(decoded, x).sqrt() <= 1 + off + off * rank**0.5 * (1 + off) + 1e-5).all()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_rank_finds_a_matrix_of_that_rank(shape):
    left = torch.randn(2, shape[0], 3, generator=seeded(1))
    x = left @ torch.randn(2, 3, shape[1], generator=seeded(2))
    compressor = RankK(3 / min(shape))
    assert (lost(compressor.decode(compressor.encode(x, seeded()), *shape), x) < 1e-10).all()


def test_rank_draws_another_sketch_for_every_matrix():
    x = torch.randn(1, 12, 20, generator=seeded()).expand(2, 12, 20)
    first, second = RankK(0.2).encode(x, seeded())
    assert not torch.equal(first, second)


def test_a_random_walk_comes_to_every_entry_once():
    """Whatever its stride, of entries whose number has many divisors."""
    x, compressor = torch.randn(64, 12, 20, generator=seeded()), RandK(1.0)
    assert torch.equal(compressor.decode(compressor.encode(x, seeded()), 12, 20), x)


@pytest.mark.parametrize("name", REFERENCE_ROUNDING)
@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0])
def test_top_and_quantize_agree_with_numpy(fraction, name):
    x = torch.randn(2, 13, 17, generator=seeded())
    x[:, 0, :3] = torch.tensor([1.5, 1 + 2**-8, 1 + 3 * 2**-8])  # halfway
    rounding = REFERENCE_ROUNDING[name]
    for compressor, expected in [
        (TopK(fraction, FORMATS[name]), reference.top_k(fraction, rounding)),
        (Quantize(FORMATS[name]), reference.quantize(rounding)),
    ]:
        decoded = compressor.decode(compressor.encode(x), 13, 17)
        for matrix, original in zip(decoded, x, strict=True):
            assert np.array_equal(matrix.numpy(), expected(original.double().numpy(), None))


def test_a_payload_of_another_length_is_refused():
    for name, shape, excess in product(COMPRESSORS, [(13, 17), (1, 9), (9, 1)], [-1, 1]):
        length = COMPRESSORS[name].payload_bytes(*shape) + excess
        with case(name, shape, excess), pytest.raises(ValueError, match=f"{length} bytes"):
            COMPRESSORS[name].decode(torch.zeros(2, length, dtype=torch.uint8), *shape)


def test_fit_quantizes_where_nothing_is_saved():
    shapes = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 50), (50, 3), (64, 64), (768, 768)]
    for (name, compressor), (m, n) in product(COMPRESSORS.items(), shapes):
        fitted = compressor.fit(m, n)
        whole = Quantize(compressor.values)
        if compressor.payload_bytes(m, n) < whole.payload_bytes(m, n):
            assert fitted is compressor, (name, m, n)
        else:
            assert isinstance(fitted, Quantize), (name, m, n)
            assert fitted.values is compressor.values, (name, m, n)
        assert fitted.payload_bytes(m, n) <= whole.payload_bytes(m, n), (name, m, n)


def test_fit_keeps_what_saves():
    assert TopK(0.1).fit(64, 64).payload_bytes(64, 64) < 0.2 * 4 * 64 * 64
    assert RankK(0.1).fit(64, 64).payload_bytes(64, 64) < 0.2 * 4 * 64 * 64


def test_payload_sizes():
    """Of 768 x 768 matrices, by hand: 9 bits a natural value, factors of rank 77."""
    entries, factors = 768 * 768, 2 * 768 * 77
    assert Identity().payload_bytes(768, 768) == 4 * entries
    assert Quantize("bfloat16").payload_bytes(768, 768) == 2 * entries
    assert Quantize("natural").payload_bytes(768, 768) == 9 * entries // 8
    assert RankK(0.1).payload_bytes(768, 768) == 4 * factors
    assert RankK(0.1, "natural").payload_bytes(768, 768) == 9 * factors // 8


def test_only_float32_is_lossless():
    assert {name for name, c in COMPRESSORS.items() if c.lossless} == {
        "identity",
        "quantize float32",
    }


@pytest.mark.parametrize("kind", [TopK, RankK])
@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan"), "0.5", None])
def test_impossible_fractions_are_refused(kind, fraction):
    with pytest.raises(ValueError, match="fraction"):
        kind(fraction)


@pytest.mark.parametrize("kind", [Quantize, lambda values: TopK(0.1, values)])
@pytest.mark.parametrize("values", ["float16", "", None, 3])
def test_unknown_formats_are_refused(kind, values):
    with pytest.raises(ValueError, match="float32, bfloat16, natural"):
        kind(values)


@pytest.mark.parametrize("name", FORMATS)
def test_half_precision_gradients_survive(name):
    """The optimizer converts gradients to float32, where bfloat16 numbers are exact."""
    x = torch.randn(2, 9, 11, generator=seeded()).bfloat16()
    compressor = Quantize(FORMATS[name])
    decoded = compressor.decode(compressor.encode(x.float(), seeded()), 9, 11)
    assert torch.equal(decoded.bfloat16(), x) == (name in ("float32", "bfloat16"))


def natural_draws(values, count):
    """(count, len(values)) independent roundings of every value."""
    x = torch.tensor(values).expand(count, 1, -1)
    return Natural().decode(Natural().encode(x, seeded()), 1, x.shape[2])[:, 0]


def test_natural_is_unbiased():
    values = torch.logspace(-30, 30, 99) * torch.tensor([1.0, -1.0]).repeat(50)[:99]
    draws = natural_draws(values.tolist(), 4096).double()
    exact = values.double()
    power = torch.exp2(exact.abs().log2().floor())
    share = exact.abs() / power - 1
    deviation = power * (share * (1 - share) / 4096).sqrt()
    assert ((draws.mean(0) - exact).abs() <= 6 * deviation).all()


def test_natural_writes_only_powers_of_two_around_the_value():
    values = torch.randn(500, generator=seeded())
    draws = natural_draws(values.tolist(), 16)
    mantissas, _ = torch.frexp(draws)
    assert (mantissas.abs() == 0.5).all()
    assert (draws.sign() == values.sign()).all()
    ratios = (draws / values).double()
    assert ((ratios > 0.5) & (ratios <= 2)).all()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_natural_is_exact_on_powers_of_two(rounding):
    powers = torch.tensor([2.0**exponent for exponent in range(-126, 128)])
    x = torch.stack([powers, -powers, torch.zeros_like(powers)])
    values = Natural(rounding)
    for seed in range(20):
        decoded = values.decode(values.encode(x[None], seeded(seed)), *x.shape)
        assert torch.equal(decoded[0], x)


@pytest.mark.parametrize(
    ("value", "upper", "probability"),
    [
        (1.25, 2, 0.25),
        (1.5, 2, 0.5),
        (-3.5, -4, 0.75),
        (2.0**100 * 1.0625, 2.0**101, 0.0625),
        (2.0**-127, 2.0**-126, 0.5),  # below the normal range the lower neighbour is 0
        (-(2.0**-128), -(2.0**-126), 0.25),
    ],
)
def test_natural_rounds_up_with_the_published_probability(value, upper, probability):
    draws = natural_draws([value], 20_000)
    share = (draws == upper).double().mean()
    assert abs(share - probability) <= 6 * (probability * (1 - probability) / 20_000) ** 0.5
    assert set(draws[draws != upper].tolist()) == {0.0 if abs(upper) < 2.0**-125 else upper / 2}
