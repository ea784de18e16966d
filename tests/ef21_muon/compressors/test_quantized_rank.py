"""Low rank with a coarse basis and rows that are fitted to it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import ALWAYS_THE_SAME, batches, lost, seeded

from ef21_muon.compressors import QuantizedRank, RankK, Scaled
from ef21_muon.values import Normal

NEAREST = {"format": "int5", "rounding": "nearest"}


def through(compressor, x, seed=0):
    return compressor.decode(compressor.encode(x, seeded(seed)), *x.shape[1:])


def estimate_error(compressor, m, n):
    """EF21's mean ||G - M|| / ||M|| in rounds 20 to 40, M the momentum of a noisy gradient."""
    generator = seeded(5)
    u, _, v = torch.linalg.svd(torch.randn(1, m, n, generator=generator), full_matrices=False)
    gradient = u / torch.arange(1, min(m, n) + 1) @ v
    gradient /= gradient.square().mean().sqrt()
    momentum, estimate, errors = torch.zeros(1, m, n), torch.zeros(1, m, n), []
    for step in range(40):
        noise = 0.5 * torch.randn(1, m, n, generator=generator)
        momentum = 0.8 * momentum + 0.2 * (gradient + noise)
        estimate = estimate + through(compressor, momentum - estimate, step)
        errors.append((estimate - momentum).norm() / momentum.norm())
    return torch.stack(errors[20:]).mean()


@pytest.mark.parametrize("shape", [(24, 9), (9, 24), (16, 16)])
@pytest.mark.parametrize("basis", ["float32", "normal2", "int3", "sign"])
def test_rows_are_least_squares_for_the_basis_that_is_sent(shape, basis):
    """NumPy's least squares, for the basis as it is read out of the message."""
    x = torch.randn(1, *shape, generator=seeded(1))
    compressor = QuantizedRank(0.4, "float32", basis)
    message = compressor.encode(x, seeded(2))
    rank, long = compressor.kept(min(shape)), max(shape)
    sent = compressor.basis.payload_bytes(rank, long)
    p = compressor.basis.decode(message[:, 4 : 4 + sent], rank, long)[0].double().numpy().T
    tall = x[0].double().numpy()
    tall = tall if shape[0] >= shape[1] else tall.T
    expected = p @ np.linalg.lstsq(p, tall, rcond=None)[0]
    expected = expected if shape[0] >= shape[1] else expected.T
    assert compressor.decode(message, *shape)[0].numpy() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("formats", [("normal4", "normal2"), ("int2", "sign"), ("natural", "int2")])
@settings(ALWAYS_THE_SAME, max_examples=40)
@given(x=batches(), fraction=st.sampled_from([0.05, 0.3, 1.0]), seed=st.integers(0, 99))
def test_no_message_is_further_from_x_than_zero(formats, x, fraction, seed):
    """Whatever the matrix and the formats; 1e-5 is float32's."""
    compressor = QuantizedRank(fraction, *formats)
    decoded = through(compressor, x, seed)
    assert decoded.isfinite().all()
    assert (lost(decoded, x) <= 1 + 1e-5).all()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_with_an_exact_basis_a_matrix_of_that_rank_is_found(shape):
    left = torch.randn(2, shape[0], 3, generator=seeded(1))
    x = left @ torch.randn(2, 3, shape[1], generator=seeded(2))
    assert (lost(through(QuantizedRank(3 / min(shape), "float32", "float32"), x), x) < 1e-8).all()


def test_a_wide_matrix_is_sent_as_its_transpose():
    x = torch.randn(2, 24, 9, generator=seeded(1))
    compressor = QuantizedRank(0.3)
    tall, wide = compressor.encode(x, seeded(2)), compressor.encode(x.mT, seeded(2))
    assert torch.equal(tall, wide)
    decoded = compressor.decode(tall, 24, 9)
    assert torch.allclose(decoded, compressor.decode(wide, 9, 24).mT, atol=1e-6)


@pytest.mark.parametrize("shape", [(512, 128), (128, 512), (256, 256)])
def test_error_feedback_gets_as_far_as_with_rounded_factors_in_three_quarters_of_the_bytes(shape):
    fitted, rounded = QuantizedRank(0.12), RankK(0.1, NEAREST)
    assert fitted.payload_bytes(*shape) < 0.75 * rounded.payload_bytes(*shape)
    assert estimate_error(fitted, *shape) < 1.05 * estimate_error(rounded, *shape)


def test_sizes_names_and_refusals():
    """Of 512 x 128 at rank 15: 4 bytes of s, 512 x 15 x 2 bits and 128 x 15 x 4, 30 scales of 2."""
    compressor = QuantizedRank(0.12)
    assert compressor.payload_bytes(512, 128) == 4 + 512 * 15 // 4 + 128 * 15 // 2 + 30 * 2
    assert compressor.payload_bytes(128, 512) == compressor.payload_bytes(512, 128)
    assert str(compressor) == "quantized rank 12% normal2 x normal4"
    assert str(QuantizedRank(0.1, "float32")) == "quantized rank 10% normal2 x float32"
    with pytest.raises(ValueError, match="Scaled has no default scale for quantized rank 10%"):
        Scaled(QuantizedRank(0.1, "natural"))
    assert isinstance(compressor.basis, Normal)
    assert compressor.alpha(64, 32) == 0
    with pytest.raises(ValueError, match="normal got bits=9: give 1 to 6"):
        QuantizedRank(0.1, basis="normal9")
    with pytest.raises(ValueError, match=r"7 bytes.*quantized rank 12%"):
        compressor.decode(torch.zeros(1, 7, dtype=torch.uint8), 12, 20)
