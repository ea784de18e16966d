"""The largest entries of every chunk against a loop, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_reference import chunk_top_k, statistical
from matrices import ALWAYS_THE_SAME, seeded

from ef21_muon.compressors import ChunkTopK, Quantize
from ef21_muon.compressors.sparse import ChunkPlaces

SIDES = st.integers(1, 40)


def through(compressor, x):
    return compressor.decode(compressor.encode(x), *x.shape[1:])


@settings(ALWAYS_THE_SAME, max_examples=80)
@given(m=SIDES, n=SIDES, chunk=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_it_agrees_with_a_loop(m, n, chunk, share, seed):
    k = max(1, round(share * chunk**2))
    x = torch.randn(2, m, n, generator=seeded(seed))
    compressor = ChunkTopK(k, chunk)
    message = compressor.encode(x)
    assert message.shape == (2, compressor.payload_bytes(m, n))
    for found, matrix in zip(compressor.decode(message, m, n), x, strict=True):
        expected = chunk_top_k(k, chunk, lambda kept: kept)(matrix.double().numpy())
        assert np.array_equal(found.double().numpy(), expected)


@pytest.mark.parametrize("shape", [(12, 20), (64, 64), (96, 1), (7, 128)])
@pytest.mark.parametrize("bits", [2, 4])
def test_values_of_a_matrix_share_a_table(shape, bits):
    x = torch.randn(3, *shape, generator=seeded(1)) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    decoded = through(ChunkTopK(5, 16, f"statistical{bits}"), x)
    for found, matrix in zip(decoded.double().numpy(), x.double().numpy(), strict=True):
        expected = chunk_top_k(5, 16, statistical(bits))(matrix)
        assert np.abs(found - expected).max() < 1e-6 * np.abs(matrix).max()
        assert len(np.unique(found)) <= 1 + 2**bits


@pytest.mark.parametrize(
    ("shape", "sides", "kept"),
    [
        ((768, 3072), (64, 64), 64),
        ((768, 1), (64, 1), 1),
        ((48, 36), (48, 36), 27),
        ((100, 64), (50, 64), 50),
        ((8, 4), (8, 4), 1),  # half an entry
        ((131, 131), (1, 1), 1),
    ],
)
def test_k_goes_down_with_the_chunk(shape, sides, kept):
    chunks = ChunkTopK(64)._places(*shape)
    assert (chunks.sides, chunks.k) == (sides, kept)
    assert ChunkTopK(64).alpha(*shape) == kept / (sides[0] * sides[1])
    assert ChunkTopK(64, values="statistical2").alpha(*shape) == 0


def test_payload_sizes():
    """Of 64 in 4096 Elias-Fano takes 8 bits, an index in the chunk 12, or 6 in one of 64."""
    kept = 768 * 3072 // 64
    assert ChunkTopK(64).payload_bytes(768, 3072) == kept + 4 * kept
    assert ChunkTopK(64, values="statistical2").payload_bytes(768, 3072) == kept + 20 + kept // 4
    assert ChunkTopK(64).payload_bytes(768, 1) == 12 * 6 // 8 + 4 * 12


@pytest.mark.parametrize(("fixed", "k"), [(True, 1), (False, 64)])
def test_places_either_way(fixed, k):
    chunks = ChunkPlaces(128, 192, 64, k)
    assert chunks.fixed_width == fixed
    places = chunks.largest(torch.randn(3, chunks.count, chunks.size, generator=seeded()))
    packed = chunks.pack_places(places)
    assert packed.shape == (3, chunks.index_bytes)
    starts = torch.arange(chunks.count)[:, None] * chunks.size
    assert torch.equal(chunks.unpack_positions(packed), (places + starts).flatten(1))


@pytest.mark.parametrize("values", ["float32", "statistical2", "statistical8"])
def test_zeros_constants_and_single_entries(values):
    compressor = ChunkTopK(2, 4, values)
    assert not through(compressor, torch.zeros(2, 8, 12)).any()
    constant = through(compressor, torch.full((1, 8, 12), 0.1))
    assert (constant != 0).sum() == 6 * 2
    assert set(constant.unique().tolist()) == {0.0, torch.tensor(0.1).item()}
    assert torch.equal(through(compressor, torch.tensor([[[3.0]]])), torch.tensor([[[3.0]]]))
    x = torch.randn(2, 8, 12, generator=seeded())
    assert torch.equal(compressor.encode(x), compressor.encode(x))


def test_titles_and_fit():
    assert str(ChunkTopK(64, values="statistical2")) == "top 64 of 64x64 statistical2"
    assert isinstance(ChunkTopK(2, 4).fit(1, 1), Quantize)
    fitting = ChunkTopK(2, 4)
    assert fitting.fit(8, 12) is fitting


@pytest.mark.parametrize(
    ("k", "chunk"), [(0, 64), (-1, 64), (1.5, 64), (17, 4), (1, 0), (1, 2.0), (True, 4)]
)
def test_other_options_are_refused(k, chunk):
    with pytest.raises(ValueError, match="give a whole number above 0"):
        ChunkTopK(k, chunk)
