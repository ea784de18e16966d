"""The normal value format: its rotation, its levels, and what is left of heavy tails."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import ALWAYS_THE_SAME

from ef21_muon.values import Integer, Normal
from ef21_muon.values import levels as module
from ef21_muon.values.base import AT_A_TIME
from ef21_muon.values.levels import normal_levels, rotate_

LEVELS = {  # J. Max, "Quantizing for minimum distortion" (1960), table I: the positive ones
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
LOST = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006442}


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
@given(length=st.integers(1, 700), longest=st.sampled_from([16, 1 << 16]), seed=st.integers(0, 99))
def test_a_rotation_keeps_lengths_and_angles_and_is_undone(length, longest, seed):
    """In one segment and a last one, or in many."""
    x = torch.randn(2, 3, length, generator=seeded(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONGEST", longest)
        turned = rotate_(x.clone())
        assert torch.allclose(turned @ turned.mT, x @ x.mT, rtol=1e-4, atol=1e-3)
        assert torch.allclose(rotate_(turned.clone(), back=True), x, atol=1e-5)
        assert torch.equal(rotate_(x.clone()), turned), "the same each time"


@pytest.mark.parametrize("power", range(13))
def test_the_transform_is_sylvesters(power):
    """And the bits of a row do not depend on the others."""
    x = torch.randn(3, 2, 1 << power, generator=seeded())
    expected, apart = x.double(), 1
    while apart < 1 << power:
        first, second = expected.unflatten(2, (-1, 2, apart)).unbind(3)
        expected = torch.stack((first + second, first - second), 3).flatten(2)
        apart *= 2
    found = module._hadamard(x)
    torch.testing.assert_close(found.double(), expected * 2 ** (-power / 2), rtol=0, atol=1e-5)
    for row in range(3):
        assert torch.equal(module._hadamard(x[row : row + 1]), found[row : row + 1])


@pytest.mark.parametrize("shape", [(1, 6, 100), (4, 1, 5000), (2, 3, 64)])
def test_pieces_do_not_matter(monkeypatch, shape):
    x = torch.randn(shape, generator=seeded())
    turned, back = rotate_(x.clone()), rotate_(x.clone(), back=True)
    monkeypatch.setitem(AT_A_TIME, "cpu", 128)
    assert torch.equal(rotate_(x.clone()), turned)
    assert torch.equal(rotate_(x.clone(), back=True), back)


@pytest.mark.parametrize("length", [64, 96, 100, 127, 768, 1024, 3072, 5000])
def test_a_rotation_spreads_each_entry(length):
    """Over a third of the others at least; none becomes more than 5 times what is even."""
    turned = rotate_(torch.eye(length))
    assert turned.abs().max() * length**0.5 < 5
    assert (turned != 0).sum(1).min() > length / 3


@pytest.mark.parametrize("length", [64, 96, 512, 768, 1024])
def test_regular_rows_look_as_normal_as_others(length):
    """All equal, alternating, a step, and rows of Hadamard's matrix, which signs have to break."""
    ones, places = torch.ones(length), torch.arange(length)
    rows = [ones, ones - 2 * (places % 2), ones - 2 * (places >= length // 2)]
    rows += [ones - 2 * (places // 4 % 2), ones - 2 * (places // 16 % 2)]
    x = torch.stack(rows)[:, None]
    for row in x:
        assert lost(Normal(2), row[None]) < 0.2
        assert lost(Normal(4), row[None]) < 0.03


def test_torch_defaults_do_not_matter():
    x = torch.randn(1, 3, 40, generator=seeded())
    expected = through(Normal(3), x)
    for cached in (module._signs, module._table):
        cached.cache_clear()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            found = through(Normal(3), x)
    finally:
        torch.set_default_device("cpu")
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert not module._table(normal_levels(3), x.device).is_inference()


@pytest.mark.parametrize("bits", [2, 4])
def test_encoding_agrees_with_numpy(bits):
    """The rotation as a matrix; the nearest levels by search, for the scale and then by it."""
    x = torch.randn(1, 5, 24, generator=seeded(3)) ** 3
    matrix = rotate_(torch.eye(24)).double().numpy()
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
    assert lost(Normal(bits), x) < lost(Integer(bits, rounding="nearest"), x) / 4


def test_messages_of_long_rows_are_turned_in_segments():
    x = torch.randn(1, 1, 150_001, generator=seeded()) ** 3
    assert lost(Normal(4), x) == pytest.approx(LOST[4], rel=0.05)
    assert module._signs(module.LONGEST, x.device).numel() == 2 * module.LONGEST


@pytest.mark.parametrize("bits", [0, 7, 2.0, "4", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"normal got bits=.*: give 1 to 6"):
        Normal(bits)
