"""The largest entries against a stable sort."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ef21_muon.compressors import selection
from ef21_muon.compressors.selection import largest
from ef21_muon.values.base import AT_A_TIME


def by_sorting(x, k):
    """The first k of a stable sort by falling magnitude, in increasing order."""
    order = np.argsort(-np.abs(x.numpy().astype(np.float64)), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, :k], axis=1))


@settings(derandomize=True, max_examples=60)
@given(
    rows=st.integers(1, 4),
    n=st.integers(1, 300),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["normal", "few values", "zeros", "wide"]),
)
@pytest.mark.parametrize("sorted_below", [selection.SORTED_BELOW, 0])
def test_it_is_a_stable_sort(sorted_below, rows, n, share, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator)
    x = {"normal": x, "few values": x.round(), "zeros": 0 * x, "wide": x.pow(21) * 1e-10}[kind]
    k = max(1, round(share * n))
    with mock.patch.object(selection, "SORTED_BELOW", sorted_below):
        assert torch.equal(largest(x, k), by_sorting(x, k))


@settings(derandomize=True)
@given(
    rows=st.integers(1, 4), n=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_a_gpu_finds_the_same_kth_entry_and_as_many_equal_to_it(rows, n, share, seed):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).mul(2).round()
    bits, k = x.view(torch.int32), max(1, round(share * n))
    for found, expected in zip(
        selection.kth_by_topk(bits, k),
        selection.kth_by_histograms(bits.split(7, 1), k),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_chunks_do_not_show(monkeypatch, chunk):
    monkeypatch.setitem(AT_A_TIME, "cpu", chunk)
    monkeypatch.setattr(selection, "SORTED_BELOW", 0)
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).mul(3).round()
    for k in (1, 13, 50):
        assert torch.equal(largest(x, k), by_sorting(x, k))


@pytest.mark.parametrize("sorted_below", [selection.SORTED_BELOW, 0])
def test_what_is_not_finite_comes_first(monkeypatch, sorted_below):
    monkeypatch.setattr(selection, "SORTED_BELOW", sorted_below)
    x = torch.tensor([[1.0, float("inf"), -2.0, float("nan"), 1e38]])
    assert largest(x, 2).tolist() == [[1, 3]]
