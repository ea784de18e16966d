"""The normal value format: its rotation, its levels, and what is left of heavy tails."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ef21_muon import Integer, Normal
from ef21_muon.normal import normal_levels, rotate, rotate_back

LEVELS = {  # J. Max, "Quantizing for minimum distortion" (1960), table I: the positive ones
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
LOST = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006442}
ALWAYS_THE_SAME = settings(derandomize=True, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def through(values, x):
    return values.decode(values.encode(x), *x.shape[1:])


def lost(values, x):
    return ((through(values, x) - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_those_of_the_literature(bits):
    levels = normal_levels(bits)
    assert levels[2 ** (bits - 1) :] == pytest.approx(LEVELS[bits], abs=6e-4)
    assert levels == tuple(-level for level in reversed(levels))


@pytest.mark.parametrize("bits", LOST)
def test_of_normal_values_as_much_is_lost_as_the_literature_says(bits):
    x = torch.randn(4, 64, 1024, generator=seeded())
    assert lost(Normal(bits), x) == pytest.approx(LOST[bits], rel=0.02)


@ALWAYS_THE_SAME
@given(length=st.integers(1, 700), seed=st.integers(0, 99))
def test_a_rotation_keeps_lengths_and_angles_and_is_undone(length, seed):
    x = torch.randn(2, 3, length, generator=seeded(seed))
    before = x.clone()
    turned = rotate(x)
    assert torch.equal(x, before)
    assert torch.allclose(turned @ turned.mT, x @ x.mT, rtol=1e-4, atol=1e-3)
    assert torch.allclose(rotate_back(turned), x, atol=1e-5)
    assert torch.equal(rotate(x), turned), "the same each time"


@pytest.mark.parametrize("length", [64, 96, 100, 127, 768, 3072, 5000])
def test_a_rotation_spreads_each_entry_over_all(length):
    """No entry of a turned unit vector is more than 5 times what it is of an even one."""
    turned = rotate(torch.eye(length))
    assert turned.abs().max() * length**0.5 < 5
    assert (turned != 0).float().mean() > 0.6


@pytest.mark.parametrize("bits", [2, 4])
def test_encoding_agrees_with_numpy(bits):
    """The rotation as a matrix; levels by search; the scale by least squares, twice."""
    x = torch.randn(1, 5, 24, generator=seeded(3)) ** 3
    matrix = rotate(torch.eye(24)).double().numpy()
    levels = np.array(normal_levels(bits))
    decoded = through(Normal(bits), x)[0].numpy()
    for row, found in zip(x[0].double().numpy(), decoded, strict=True):
        turned = row @ matrix
        first = levels[np.abs(turned / np.sqrt(np.mean(turned**2)) - levels[:, None]).argmin(0)]
        scale = torch.tensor(turned @ first / (first @ first)).bfloat16().double().item()
        second = levels[np.abs(turned / scale - levels[:, None]).argmin(0)]
        assert found == pytest.approx(scale * second @ matrix.T, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_heavy_tails_lose_less_than_in_equal_steps(bits):
    x = torch.randn(2, 16, 768, generator=seeded()) ** 3
    assert lost(Normal(bits), x) == pytest.approx(LOST[bits], rel=0.1)
    assert lost(Normal(bits), x) < lost(Integer(bits, stochastic=False), x) / 4


@pytest.mark.parametrize("bits", [0, 7, 2.0, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"normal got bits=.*: give 1 to 6"):
        Normal(bits)
