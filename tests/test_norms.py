import numpy as np
import pytest
import reference
import torch

from ef21_muon import Sign, Spectral
from ef21_muon.newton_schulz import newton_schulz

SHAPES = [(1, 1), (1, 9), (9, 1), (12, 12), (8, 30), (30, 8), (64, 20)]
SCALES = [1e-30, 1e-10, 1.0, 1e10, 1e30]
# What five steps of Jordan's quintic make of singular values in [0.003, 1]: the extremes of the
# scalar iteration, and the rounding of float32.
BAND = (0.6818 - 1e-4, 1.2024 + 1e-4)


def random_matrices(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(m, n, values, seed=0):
    """An m x n matrix with the given min(m, n) singular values, largest first."""
    left, _ = np.linalg.qr(random_matrices(m, len(values), seed=seed).double().numpy())
    right, _ = np.linalg.qr(random_matrices(n, len(values), seed=seed + 1).double().numpy())
    return torch.from_numpy(left * values @ right.T).float()


def in_band(m, n):
    """A matrix whose singular values, relative to its Frobenius norm, are all in [0.003, 1]."""
    values = np.geomspace(1, 0.01, min(m, n))
    assert values[-1] / np.linalg.norm(values) > 0.003
    return with_singular_values(m, n, values)


def inner(a, b):
    return (a.double() * b.double()).sum((-2, -1))


def test_the_band_is_that_of_the_scalar_iteration():
    values = np.linspace(0.003, 1, 1_000_001)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert BAND[0] <= values.min() < BAND[0] + 2e-4
    assert BAND[1] - 2e-4 < values.max() <= BAND[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_agrees_with_numpy(shape):
    x = in_band(*shape)
    expected = reference.newton_schulz(x.double().numpy())
    error = np.linalg.norm(newton_schulz(x).numpy() - expected)
    assert error < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_newton_schulz_takes_the_steps_asked_for(steps):
    x = in_band(8, 30)
    expected = reference.newton_schulz(x.double().numpy(), steps)
    np.testing.assert_allclose(newton_schulz(x, steps).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_keeps_singular_vectors_and_puts_values_in_the_band(shape):
    x = in_band(*shape)
    left, _, right = np.linalg.svd(x.double().numpy(), full_matrices=False)
    rotated = left.T @ newton_schulz(x).double().numpy() @ right.T
    values = np.diag(rotated)
    assert np.abs(rotated - np.diag(values)).max() < 1e-4
    assert ((values > BAND[0]) & (values < BAND[1])).all()


def test_newton_schulz_of_rank_deficient_matrices_stays_small_where_they_are_zero():
    x = with_singular_values(10, 20, np.array([1.0, 0.5]))
    values = np.linalg.svd(newton_schulz(x).double().numpy(), compute_uv=False)
    assert (values[:2] > BAND[0]).all()
    assert (values[2:] < 1e-3).all()


def test_newton_schulz_runs_in_the_dtype_asked_for():
    x = in_band(8, 30)
    half = newton_schulz(x, dtype=torch.bfloat16)
    assert half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    assert not torch.equal(half, newton_schulz(x))
    assert (half - newton_schulz(x)).norm() < 0.1 * half.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_is_the_minimiser_over_its_ball(shape):
    gradient = random_matrices(*shape)
    step = Sign().lmo(gradient)
    torch.testing.assert_close(
        inner(gradient, step), -Sign().dual(gradient).double(), rtol=1e-6, atol=0
    )
    norm = shape[1] * step.double().abs().max()
    torch.testing.assert_close(norm, torch.tensor(1.0).double(), rtol=1e-6, atol=0)
    np.testing.assert_allclose(step, reference.sign_lmo(gradient.double().numpy()), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_is_the_minimiser_over_its_ball_within_the_band(shape):
    gradient = in_band(*shape)
    step = Spectral().lmo(gradient)
    ratio = -inner(gradient, step) / Spectral().dual(gradient)
    assert BAND[0] < ratio < BAND[1]
    norm = (shape[1] / shape[0]) ** 0.5 * torch.linalg.matrix_norm(step.double(), 2)
    assert BAND[0] < norm < BAND[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectral_dual_is_attained_by_the_exact_polar_factor(shape):
    gradient = random_matrices(*shape)
    left, _, right = np.linalg.svd(gradient.double().numpy(), full_matrices=False)
    step = torch.from_numpy(-((shape[0] / shape[1]) ** 0.5) * left @ right)
    torch.testing.assert_close(
        inner(gradient, step), -Spectral().dual(gradient).double(), rtol=1e-5, atol=0
    )


def test_a_vector_gets_the_rms_norm():
    gradient = random_matrices(9, 1)
    exact = -3 * gradient / gradient.norm()
    step = Spectral().lmo(gradient)
    band = step / exact
    torch.testing.assert_close(band, band[:1].expand(9, 1))
    assert BAND[0] < band[0] < BAND[1]


@pytest.mark.parametrize("norm", [Spectral(), Sign()], ids=["spectral", "sign"])
@pytest.mark.parametrize("shape", SHAPES)
class TestBothNorms:
    def test_a_batch_is_treated_one_by_one(self, norm, shape):
        gradients = random_matrices(2, 3, *shape)
        steps, duals = norm.lmo(gradients), norm.dual(gradients)
        assert steps.shape == gradients.shape
        assert duals.shape == (2, 3)
        for index in np.ndindex(2, 3):
            torch.testing.assert_close(steps[index], norm.lmo(gradients[index]))
            torch.testing.assert_close(duals[index], norm.dual(gradients[index]))

    def test_the_step_does_not_depend_on_the_scale(self, norm, shape):
        gradient = in_band(*shape)
        step = norm.lmo(gradient)
        for scale in SCALES:
            torch.testing.assert_close(norm.lmo(gradient * scale), step, rtol=1e-4, atol=1e-5)
            dual = norm.dual(gradient * scale)
            torch.testing.assert_close(dual, norm.dual(gradient) * scale, rtol=1e-5, atol=0)

    def test_zeros_stay_zero(self, norm, shape):
        zeros = torch.zeros(2, *shape)
        assert torch.equal(norm.lmo(zeros), zeros)
        assert torch.equal(norm.dual(zeros), torch.zeros(2))

    def test_zeros_beside_others_stay_zero(self, norm, shape):
        gradients = torch.stack([torch.zeros(shape), random_matrices(*shape)])
        steps = norm.lmo(gradients)
        assert torch.equal(steps[0], torch.zeros(shape))
        torch.testing.assert_close(steps[1], norm.lmo(gradients[1]))

    def test_the_gradient_is_left_alone(self, norm, shape):
        gradient = random_matrices(*shape)
        before = gradient.clone()
        norm.lmo(gradient)
        assert torch.equal(gradient, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_of_the_transpose_is_the_transpose_up_to_the_radius(shape):
    """sqrt(d_out / d_in) becomes its inverse."""
    gradient = in_band(*shape)
    expected = Spectral().lmo(gradient).T * (shape[1] / shape[0])
    torch.testing.assert_close(Spectral().lmo(gradient.T), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, -1])
def test_spectral_needs_a_step(steps):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        Spectral(steps)


@pytest.mark.parametrize("norm", [Spectral(), Sign()], ids=["spectral", "sign"])
def test_larger_matrices_cost_more(norm):
    assert 0 < norm.cost(8, 16) < norm.cost(16, 16) < norm.cost(16, 64)
