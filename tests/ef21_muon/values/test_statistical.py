"""The statistical value format against a loop in float64, and by hand."""

import local_reference
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matrices import ALWAYS_THE_SAME, batches, lost, seeded

from ef21_muon.values import Statistical, levels, value_format
from ef21_muon.values.base import AT_A_TIME


def through(values, x):
    return values.decode(values.encode(x), *x.shape[1:])


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@settings(ALWAYS_THE_SAME, max_examples=25)
@given(
    x=batches(),
    by_row=st.booleans(),
    span=st.sampled_from([4.0, 6.0]),
    piece=st.sampled_from([7, 1 << 20]),
)
def test_it_agrees_with_a_loop(bits, x, by_row, span, piece):
    """Where no entry is on the edge of a bin, to the rounding of float32; piece after piece."""
    values = Statistical(bits, "row" if by_row else "tensor", span)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AT_A_TIME, "cpu", piece)
        decoded = through(values, x).double().numpy()
    exact = x.double().numpy()
    blocks = exact.reshape(-1, exact.shape[2]) if by_row else exact.reshape(len(exact), -1)
    for block, found in zip(blocks, decoded.reshape(blocks.shape), strict=True):
        largest = np.abs(block).max() or 1
        if np.ptp(block) > 1e-5 * largest:
            steps, _ = local_reference.statistical_steps(block / largest, bits, span)
            assume(np.abs(steps % 1 - 0.5).min() > 1e-4)
        expected = largest * local_reference.statistical(bits, span)(block / largest)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * largest)


@settings(ALWAYS_THE_SAME, max_examples=40)
@given(bits=st.integers(2, 4), rows=st.integers(1, 3), n=st.integers(1, 50), seed=st.integers(0, 9))
def test_a_gpu_adds_up_the_same_sums(bits, rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**40), 2**40, (rows, 2, n), generator=generator)
    codes = torch.randint(256, (rows, 2, n), generator=generator).to(torch.uint8)
    found, expected = (torch.zeros(2, rows, 2, 2**bits, dtype=torch.int64) for _ in range(2))
    levels.add_by_bins(*found, values, codes)
    levels.add_by_places(*expected, values, codes)
    assert torch.equal(found, expected) and expected[1].sum() == values.numel()


@pytest.mark.parametrize(
    ("values", "x", "expected"),
    [
        (Statistical(2), [0, 0, 0, 8], [0, 0, 0, 8]),  # sd 4, a step of 6: bins 2 and 3
        (Statistical(2), [1, -1], [0, 0]),  # 0.71 sd away, both in bin 2
        (Statistical(2), [5], [5]),
        (Statistical(8), [0, 0, 0], [0, 0, 0]),
        (Statistical(4), [7, 7, 7, 7, 7], [7, 7, 7, 7, 7]),
        # sd 2, a step of 2: 1 is halfway between bins 2 and 3, -1 between 1 and 2; both go to 2.
        (Statistical(2, span=4.0), [1, -1, 3, -3, 0, 0], [0, 0, 3, -3, 0, 0]),
        # sd 2 again, a step of 0.5 in 4 bits: every value has a bin of its own.
        (Statistical(4, span=4.0), [1, -1, 3, -3, 0, 0], [1, -1, 3, -3, 0, 0]),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 2.0**100])
def test_by_hand(values, x, expected, scale):
    x, expected = (scale * torch.tensor(numbers).float()[None, None] for numbers in (x, expected))
    assert torch.equal(through(values, x), expected)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.18), (4, 0.012), (8, 0.0003)])
def test_of_normal_values_as_much_is_lost_as_it_says(bits, share):
    x = torch.randn(1, 1000, 1000, generator=seeded())
    assert lost(through(Statistical(bits), x), x).item() == pytest.approx(share, rel=0.15)


def test_every_matrix_or_row_has_a_table_of_its_own():
    x = torch.randn(3, 5, 40, generator=seeded()) * torch.logspace(-3, 3, 15).view(3, 5, 1)
    for values in (Statistical(2), Statistical(4)):
        assert torch.equal(torch.cat([through(values, one[None]) for one in x]), through(values, x))
        by_row = torch.stack([through(values, one[:, None])[:, 0] for one in x])
        assert torch.equal(through(Statistical(values.width, "row"), x), by_row)
    assert all(len(one.unique()) <= 4 for one in through(Statistical(2), x))


def test_the_same_message_on_repeat():
    x = torch.randn(2, 300, 500, generator=seeded())
    messages = [Statistical(8).encode(x) for _ in range(5)]
    assert all(torch.equal(message, messages[0]) for message in messages)


@pytest.mark.parametrize(
    ("name", "size"),
    [  # of 6 x 10: 4 bytes for each mean and each bin, and the codes
        ("statistical2", 4 * (1 + 4) + 15),
        ("statistical3", 4 * (1 + 8) + 23),
        ("statistical4", 4 * (1 + 16) + 30),
        ("statistical8", 4 * (1 + 256) + 60),
        ("statistical2@row", 6 * 4 * (1 + 4) + 15),
    ],
)
def test_names_and_sizes(name, size):
    values = value_format(name)
    assert isinstance(values, Statistical)
    assert str(values) == name
    assert values.payload_bytes(6, 10) == size
    assert values.encode(torch.ones(1, 6, 10)).shape == (1, size)
    assert str(value_format("statistical4@tensor")) == "statistical4"
    assert value_format({"format": "statistical2", "span": 4.0}).span == 4.0


@pytest.mark.parametrize("name", ["statistical", "statistical1", "statistical9", "statistical4@7"])
def test_other_formats_are_refused(name):
    with pytest.raises(ValueError, match=r"statistical2 to|give 2 to 8|give row or tensor"):
        value_format(name)


@pytest.mark.parametrize("span", [0, -1.0, float("inf"), "6"])
def test_other_spans_are_refused(span):
    with pytest.raises(ValueError, match="give a number above 0"):
        Statistical(4, span=span)


def test_what_is_not_finite_stays_so():
    x = torch.ones(2, 3, 4)
    x[0, 1, 2] = torch.nan
    decoded = through(Statistical(2), x)
    assert decoded[0].isnan().all()
    assert torch.equal(decoded[1], x[1])
