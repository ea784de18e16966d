"""Codes and indices as packed bits, and back."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import ALWAYS_THE_SAME

from ef21_muon.compressors.indices import index_bytes, pack_indices, shortest, unpack_indices
from ef21_muon.values.base import AT_A_TIME, pack, packed_bytes, unpack


def random_codes(rows, count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << width, (rows, count), generator=generator)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_integers_come_back(count):
    for width in range(33):
        codes = random_codes(3, count, width, seed=count)
        codes[0], codes[1] = 0, (1 << width) - 1
        packed = pack(codes, width)
        assert packed.dtype == torch.uint8, width
        assert packed.shape == (3, packed_bytes(count, width)), width
        assert torch.equal(unpack(packed, count, width).long(), codes), width


@settings(ALWAYS_THE_SAME, max_examples=50)
@given(st.integers(0, 32), st.integers(1, 3), st.integers(0, 70), st.integers(0, 99))
def test_integers_of_any_count_come_back(width, rows, count, seed):
    codes = random_codes(rows, count, width, seed)
    assert torch.equal(unpack(pack(codes, width), count, width).long(), codes)


@settings(ALWAYS_THE_SAME, max_examples=50)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 70), st.integers(0, 99))
def test_codes_are_neighbours_in_their_bytes_whatever_is_packed_at_a_time(width, rows, count, seed):
    codes = random_codes(rows, count, width, seed).to(torch.uint8)
    with mock.patch.dict(AT_A_TIME, cpu=32):
        packed = pack(codes, width)
        assert torch.equal(unpack(packed, count, width), codes)
    for row, message in zip(codes.tolist(), packed.tolist(), strict=True):
        bits = [code >> place & 1 for code in row for place in range(width)]
        assert message == reference_bytes(bits)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
def test_every_integer_dtype_is_packed(dtype):
    ones = random_codes(2, 13, 1, seed=0)
    for width in (1, 5, 8, 13, 32):
        assert torch.equal(unpack(pack(ones.to(dtype), width), 13, width).long(), ones)


def test_packing_wastes_less_than_a_byte():
    for width in range(33):
        for count in range(40):
            assert packed_bytes(count, width) == math.ceil(count * width / 8)


def test_packing_does_not_need_contiguous_rows():
    codes = random_codes(9, 4, 11, seed=0).T
    packed = torch.cat([torch.zeros(4, 3, dtype=torch.uint8), pack(codes, 11)], 1)
    assert torch.equal(unpack(packed[:, 3:], 9, 11), codes)


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 32])
@pytest.mark.parametrize("excess", [-1, 1])
def test_integers_of_another_length_are_refused(width, excess):
    length = packed_bytes(9, width) + excess
    if length >= 0:
        with pytest.raises(ValueError, match=f"{length} bytes"):
            unpack(torch.zeros(2, length, dtype=torch.uint8), 9, width)


# Elias-Fano, bit by bit: `width` low bits of every index, then for every value of the high bits as
# many ones as indices have it and, between two values, a zero.


def reference_pieces(indices, universe, width):
    """The low parts, and the unary code as a list of bits."""
    lows = [index % 2**width for index in indices]
    highs = [index // 2**width for index in indices]
    bits = []
    for high in range((universe - 1) // 2**width + 1):
        bits += [0] * (high > 0) + [1] * highs.count(high)
    return lows, bits


def reference_bytes(bits):
    padded = bits + [0] * (-len(bits) % 8)
    octets = [padded[start : start + 8] for start in range(0, len(padded), 8)]
    return [sum(bit << place for place, bit in enumerate(octet)) for octet in octets]


def reference_decode(lows, bits, width):
    high, indices = 0, []
    for bit in bits:
        if bit:
            indices.append(high * 2**width + lows[len(indices)])
        else:
            high += 1
    return indices


@st.composite
def index_sets(draw):
    universe = draw(st.integers(1, 400))
    count = draw(st.sampled_from([0, 1, universe]) | st.integers(0, universe))
    seeds = st.integers(0, 2**31)
    rows = []
    for seed in draw(st.lists(seeds, min_size=1, max_size=3)):
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randperm(universe, generator=generator)[:count].sort().values)
    return torch.stack(rows), universe


@settings(ALWAYS_THE_SAME, max_examples=50)
@given(index_sets())
def test_indices_are_elias_fano_coded(index_set):
    indices, universe = index_set
    count = indices.shape[1]
    packed = pack_indices(indices, universe)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(indices), index_bytes(universe, count))
    assert torch.equal(unpack_indices(packed, universe, count), indices)
    for row, message in zip(indices.tolist(), packed, strict=True):
        if count:
            width = shortest(universe, count)[1]
            lows, bits = reference_pieces(row, universe, width)
            low_bytes = packed_bytes(count, width)
            assert unpack(message[None, :low_bytes], count, width).tolist() == [lows]
            assert message[low_bytes:].tolist() == reference_bytes(bits)
            assert reference_decode(lows, bits, width) == row


def test_indices_are_as_short_as_any_width_makes_them():
    for universe in (1, 2, 9, 100, 1001):
        for count in {1, 2, universe // 10, universe // 2, universe} & set(range(1, universe + 1)):
            sizes = [
                math.ceil(count * width / 8) + math.ceil((count + (universe - 1) // 2**width) / 8)
                for width in range(20)
            ]
            assert index_bytes(universe, count) == min(sizes)


@pytest.mark.parametrize("excess", [-1, 1])
@pytest.mark.parametrize("count", [0, 1, 30, 100])
def test_indices_of_another_length_are_refused(count, excess):
    length = index_bytes(100, count) + excess
    if length >= 0:
        with pytest.raises(ValueError, match=f"{length} bytes"):
            unpack_indices(torch.zeros(2, length, dtype=torch.uint8), 100, count)


@pytest.mark.parametrize("percent", [1, 5, 10, 15, 20])
@pytest.mark.parametrize("universe", [589_824, 38_633_472])
def test_indices_take_at_most_18_percent_more_than_the_least(universe, percent):
    count = universe * percent // 100
    least = math.lgamma(universe + 1) - math.lgamma(count + 1) - math.lgamma(universe - count + 1)
    assert 8 * index_bytes(universe, count) <= 1.18 * least / math.log(2)


def test_indices_of_a_large_matrix_come_back():
    universe, count = 589_824, 29_491
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(universe, generator=generator)[:count].sort().values[None]
    assert torch.equal(
        unpack_indices(pack_indices(indices, universe), universe, count),
        indices,
    )
