"""The value formats by themselves. Seeds are fixed; means may be off by 6 standard deviations."""

import pytest
import torch

from ef21_muon.compressors.base import value_format
from ef21_muon.values import BFloat16, Float32, Integer, Natural, NaturalWindow, Normal, SignScale
from ef21_muon.values.base import AT_A_TIME

DRAWS = 4096


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def through(values, x, seed=0):
    """x (L, rows, columns), encoded and decoded."""
    return values.decode(values.encode(x, seeded(seed)), *x.shape[1:])


GAPS = {  # between the neighbours of v, as multiples of |v| and of the largest magnitude
    Natural(): (1, 0),
    **{NaturalWindow(bits): (1, 2.0 ** (3 - 2**bits)) for bits in (3, 4, 7)},
    **{Integer(bits): (0, 1 / (2 ** (bits - 1) - 1)) for bits in (2, 4, 8)},
    Integer(3, block="tensor"): (0, 1 / 3),
    Integer(3, block="1blocks"): (0, 1 / 3),
}


@pytest.mark.parametrize(("values", "gap"), GAPS.items(), ids=str)
def test_unbiased_formats_are_unbiased(values, gap):
    """Values over 12 powers of ten, so that many lie below the windows.

    A draw is one of two neighbours, so its variance is at most |v| times their gap; beside 6
    standard deviations of the mean, 12 of the draws may be off by the gap (neighbours so rare that
    their number is not normal).
    """
    assert values.unbiased
    x = torch.logspace(-12, 0, 33) * torch.tensor([1.0, -1.0, 1.0]).repeat(11)
    draws = through(values, x.expand(DRAWS, 1, 33)).double()[:, 0]
    x = x.double()
    gaps = (gap[0] * x.abs()).clamp_min(gap[1])
    allowed = 6 * (x.abs() * gaps / DRAWS).sqrt() + 12 * gaps / DRAWS
    assert ((draws.mean(0) - x).abs() <= allowed).all()
    assert draws.std(0).max() > 0


@pytest.mark.parametrize(
    "values",
    [
        *(Float32(), BFloat16(), Natural(rounding="nearest"), SignScale()),
        *(NaturalWindow(4, rounding="nearest"), Integer(4, rounding="nearest"), Normal(3)),
    ],
    ids=str,
)
def test_deterministic_formats_draw_nothing(values):
    x = torch.randn(2, 5, 7, generator=seeded())
    assert torch.equal(through(values, x, 1), through(values, x, 2))


@pytest.mark.parametrize("exponent_bits", [3, 4, 5, 6, 7])
def test_a_window_holds_powers_of_two_below_its_largest(exponent_bits):
    powers = 2.0 ** -torch.arange(2**exponent_bits - 1.0)
    x = torch.stack([powers, -powers])[None]
    values = NaturalWindow(exponent_bits)
    assert torch.equal(through(values, x), x)
    below = torch.tensor([1.0, powers[-1] / 2]).expand(1, DRAWS, 2)
    drawn = through(values, below)[..., 1]
    assert set(drawn.unique().tolist()) == {0.0, powers[-1].item()}
    assert abs((drawn > 0).double().mean() - 0.5) < 6 * 0.5 / DRAWS**0.5


def test_the_nearest_window_rounds_what_is_below_it():
    smallest = 2.0**-6
    x = torch.tensor([[[1.0, 0.51 * smallest, -0.51 * smallest, 0.49 * smallest, 0.0]]])
    expected = torch.tensor([[[1.0, smallest, -smallest, 0.0, 0.0]]])
    assert torch.equal(through(NaturalWindow(3, rounding="nearest"), x), expected)


def test_a_window_with_all_exponents_is_natural():
    """128 - 1 exponents below the largest: nothing of ordinary numbers lies below."""
    x = torch.randn(3, 8, 50, generator=seeded())
    assert torch.equal(through(NaturalWindow(7), x, 5), through(Natural(), x, 5))


def test_integers_are_multiples_of_a_step():
    x = torch.randn(2, 6, 40, generator=seeded())
    for bits in (2, 3, 4, 8):
        levels = 2 ** (bits - 1) - 1
        step = x.abs().amax(2, keepdim=True) / levels
        for rounding, off in (("stochastic", 1.0), ("nearest", 0.5)):
            decoded = through(Integer(bits, rounding), x)
            multiples = decoded / step
            assert torch.allclose(multiples, multiples.round(), atol=1e-4)
            assert multiples.abs().max() <= levels + 1e-4
            assert ((decoded - x).abs() / step).max() <= off + 1e-4


def test_sign_is_the_mean_magnitude_of_its_block():
    x = torch.tensor([[[1.0, -2.0, 3.0], [0.5, 0.5, -0.5]]])
    by_row = torch.tensor([[[2.0, -2.0, 2.0], [0.5, 0.5, -0.5]]])
    assert torch.equal(through(SignScale(), x), by_row)
    assert torch.equal(through(SignScale("tensor"), x).abs(), torch.full((1, 2, 3), 1.25))
    last_of_four = through(SignScale(4), x)[0, 1, 1:].abs()  # padded with zeros to four values
    assert torch.equal(last_of_four, torch.full((2,), 0.25))


@pytest.mark.parametrize("kind", [NaturalWindow, Integer, Normal, SignScale])
def test_blocks_do_not_see_one_another(kind):
    x = torch.randn(1, 4, 6, generator=seeded())
    louder = x.clone()
    louder[0, 2] *= 1e6
    first, second = through(kind(), x), through(kind(), louder)
    assert torch.equal(first[0, [0, 1, 3]], second[0, [0, 1, 3]])
    assert not torch.equal(through(kind(block="tensor"), x), through(kind(block="tensor"), louder))


@pytest.mark.parametrize(
    ("name", "bits", "scales"),
    [
        ("float32", 32, 0),
        ("bfloat16", 16, 0),
        ("natural", 9, 0),
        *((f"natural{b}", b + 1, 64) for b in range(3, 8)),
        *((f"int{b}", b, 4 * 64) for b in range(2, 9)),
        *((f"normal{b}", b, 2 * 64) for b in range(1, 7)),
        ("sign", 1, 4 * 64),
        ("sign@tensor", 1, 4),
        ("int4@128", 4, 4 * 48),
        ("int4@8blocks", 4, 4 * 8),
        *((f"rowcol{b}", b, 4 * 64 + 2 * 96) for b in range(2, 9)),
        ("natural4@64", 5, 96),
    ],
)
def test_sizes(name, bits, scales):
    """Of 64 rows of 96 values: whole bytes of codes, and the scales."""
    values = value_format(name)
    assert values.payload_bytes(64, 96) == 64 * 96 * bits // 8 + scales
    assert str(values) == name


def test_formats_from_mappings():
    values = value_format({"format": "natural4", "rounding": "nearest", "block": 32})
    assert (values.exponent_bits, values.rounding, values.block) == (4, "nearest", 32)
    assert str(values) == "natural4@32:nearest"
    assert value_format(values) is values


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "int",
            "int1",
            "int9",
            "natural2",
            "natural8",
            "normal",
            "normal0",
            "sign4",
            "float16",
            "int4@0",
            "int4@day",
            "int4@0blocks",
            "int4@blocks",
            "normal4@8blocks",
            "rowcol",
            "rowcol1",
            "rowcol4@row",
        ),
        *({"format": "natural", "block": 3}, {"format": "float32", "bits": 4}, {"bits": 4}, None),
        *("natural4@-1", "", 7, {"format": "sign", "rounding": "stochastic"}),
    ],
)
def test_what_is_no_format_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match=r"give|choose") as caught:
        value_format(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("natural4", "int4", "normal3", "normal3@tensor", "sign", "sign@5", "int4@tensor"),
        "sign@4blocks",
    ],
)
def test_pieces_do_not_show(monkeypatch, name):
    """Encoded eight blocks, or eight values, at a time: the same message."""
    formats = value_format(name)
    if formats.rounding:
        formats.set_rounding("nearest")
    for rows, columns in ((1, 45), (3, 7), (21, 5), (9, 16)):
        x = torch.randn(2, rows, columns, generator=seeded())
        whole = formats.encode(x)
        with monkeypatch.context() as patch:
            patch.setitem(AT_A_TIME, "cpu", 16)
            assert torch.equal(formats.encode(x), whole)
