"""Fingerprints: of every bit and place, and the same on every device."""

import pytest
import torch

from ef21_muon.transport.agreement import CHUNK, INTEGERS, fingerprint, projection

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.uint8]


def values(length, dtype=torch.float32):
    return (torch.arange(length) % 251).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 7, CHUNK - 1, CHUNK, CHUNK + 4])
def test_one_bit_anywhere_changes_it(dtype, place):
    x = values(CHUNK + 5, dtype)
    before = fingerprint(x)
    x.view(INTEGERS[x.element_size()])[place] ^= 1
    assert fingerprint(x) != before


def test_places_count_within_chunks_and_between_them():
    x = values(2 * CHUNK)
    for one, other in ((0, 1), (3, CHUNK + 3)):
        swapped = x.clone()
        swapped[[one, other]] = x[[other, one]]
        assert fingerprint(swapped) != fingerprint(x)


def test_weights_are_drawn_on_the_cpu_for_every_device():
    """Others draw other numbers; a meta device, which stands for them here, draws none."""
    with pytest.raises(RuntimeError):
        torch.Generator("meta")
    x = values(6).to("meta").view(1, 2, 3)
    assert fingerprint(x).device == projection(x).device == x.device
