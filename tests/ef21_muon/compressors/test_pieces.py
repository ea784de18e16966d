"""Indices that are packed in pieces, and where random ones begin."""

import pytest
import torch

from ef21_muon.compressors import RandK
from ef21_muon.compressors.indices import pack_indices, unpack_indices
from ef21_muon.values.base import AT_A_TIME


@pytest.mark.parametrize("universe", [128, 5000])
def test_indices_that_are_packed_in_pieces_come_back(monkeypatch, universe):
    monkeypatch.setitem(AT_A_TIME, "cpu", 64)  # 16 indices at a time
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(universe, generator=generator)[:100].sort().values for _ in range(3)]
    indices = torch.stack(rows)
    assert torch.equal(unpack_indices(pack_indices(indices, universe), universe, 100), indices)


def test_a_random_entry_may_be_any():
    """Of 5, one in each of 400 layers: a false alarm in fewer than 1 of 10^38 seeds."""
    compressor, ones = RandK(0.2, "float32").fit(1, 5), torch.ones(400, 1, 5)
    payload = compressor.encode(ones, torch.Generator().manual_seed(0))
    kept = compressor.decode(payload, 1, 5).ne(0)
    assert kept.sum((1, 2)).eq(1).all() and kept.any(0).all()
