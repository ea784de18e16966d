"""Matrices so large that their entries are taken piece by piece: pieces do not show."""

import pytest
import torch

from ef21_muon.compressors.indices import pack_indices, unpack_indices
from ef21_muon.values.base import AT_A_TIME


@pytest.mark.parametrize("universe", [128, 5000])
def test_indices_that_are_packed_in_pieces_come_back(monkeypatch, universe):
    monkeypatch.setitem(AT_A_TIME, "cpu", 64)  # 16 indices at a time
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(universe, generator=generator)[:100].sort().values for _ in range(3)]
    indices = torch.stack(rows)
    assert torch.equal(unpack_indices(pack_indices(indices, universe), universe, 100), indices)
