"""Norms, their duals and their LMOs against NumPy."""

import math

import numpy as np
import pytest
import torch
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st

from ef21_muon.norms import (
    L1,
    AdaptiveRadius,
    BiasRMS,
    ColumnNorm,
    Euclidean,
    Norm,
    Nuclear,
    RowNorm,
    Sign,
    Spectral,
)

SHAPES = [(1, 1), (1, 9), (9, 1), (12, 12), (8, 30), (40, 20)]
SCALES = [1e-30, 1e-10, 1.0, 1e10, 1e30]
# Where singular values above 0.003 of the Frobenius norm end (tests/test_newton_schulz.py).
BANDS = {"jordan": (0.6818 - 1e-4, 1.2024 + 1e-4), "polar_express": (0.8401 - 1e-4, 1.1236 + 1e-4)}
EXACT = (1 - 3e-6, 1 + 3e-6)

# Norms and their duals of float64 arrays, without scales.
PRIMAL = {
    Spectral: lambda z: np.linalg.norm(z, 2),
    Sign: lambda z: np.abs(z).max(),
    ColumnNorm: lambda z: np.sqrt((z * z).sum(0)).max(),
    RowNorm: lambda z: np.sqrt((z * z).sum(1)).max(),
    Euclidean: lambda z: np.sqrt((z * z).sum()),
    BiasRMS: lambda z: np.sqrt((z * z).sum()),
    Nuclear: lambda z: np.linalg.svd(z, compute_uv=False).sum(),
    L1: lambda z: np.abs(z).sum(),
}
DUAL = {
    Spectral: PRIMAL[Nuclear],
    Sign: PRIMAL[L1],
    ColumnNorm: lambda g: np.sqrt((g * g).sum(0)).sum(),
    RowNorm: lambda g: np.sqrt((g * g).sum(1)).sum(),
    Euclidean: PRIMAL[Euclidean],
    BiasRMS: PRIMAL[Euclidean],
    Nuclear: PRIMAL[Spectral],
    L1: PRIMAL[Sign],
}
SCION = {
    Spectral: lambda d_out, d_in: math.sqrt(d_out / d_in),
    Sign: lambda d_out, d_in: 1 / d_in,
    ColumnNorm: lambda d_out, d_in: math.sqrt(d_out),
    RowNorm: lambda d_out, d_in: 1 / math.sqrt(d_in),
    BiasRMS: lambda d_out, d_in: math.sqrt(d_out * d_in),
}
NORMS = [
    *(Spectral("svd", scaling=scaling) for scaling in ("scion", "muon", "moonlight", "none")),
    Spectral(),
    Spectral("polar_express", scaling="none"),
    *(kind(scaling) for kind in (Sign, ColumnNorm, RowNorm) for scaling in ("scion", "none")),
    *(BiasRMS(), Euclidean(), Nuclear(), L1()),
]
EXACT_NORMS = [norm for norm in NORMS if not isinstance(norm, Spectral) or norm.method == "svd"]


def band_of(norm):
    """Where the norm of its step lies: at 1, but for what Newton-Schulz is off."""
    return EXACT if norm in EXACT_NORMS else BANDS[norm.method]


def scale_of(norm, shape):
    if norm.scaling == "scion":
        return SCION[type(norm)](*shape)
    muon = {"muon": math.sqrt(max(1, shape[0] / shape[1])), "none": 1}
    return muon.get(norm.scaling, 0.2 * math.sqrt(max(shape)))


def primal(norm, z):
    return PRIMAL[type(norm)](z.double().numpy()) / scale_of(norm, z.shape)


def dual(norm, gradient):
    return DUAL[type(norm)](gradient.double().numpy()) * scale_of(norm, gradient.shape)


def inner(a, b):
    return (a.double() * b.double()).sum((-2, -1)).item()


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


def every_norm_and_shape(test):
    """A test for every norm, of all shapes."""

    @pytest.mark.parametrize("norm", NORMS, ids=repr)
    def of_all_shapes(norm):
        for shape in SHAPES:
            with case(shape):
                test(norm, shape)

    return of_all_shapes


@every_norm_and_shape
def test_the_step_is_on_the_sphere_and_attains_the_dual(norm, shape):
    gradient = in_band(*shape)
    low, high = band_of(norm)
    step = norm.lmo(gradient)
    assert low < primal(norm, step) < high
    assert low < -inner(gradient, step) / dual(norm, gradient) < high


@every_norm_and_shape
def test_the_dual_is_exact(norm, shape):
    gradient = random_matrices(*shape)
    assert norm.dual(gradient).item() == pytest.approx(dual(norm, gradient), rel=3e-6)


@every_norm_and_shape
def test_a_batch_is_treated_one_by_one(norm, shape):
    gradients = random_matrices(2, 3, *shape)
    steps, duals = norm.lmo(gradients), norm.dual(gradients)
    assert steps.shape == gradients.shape
    assert duals.shape == (2, 3)
    for index in np.ndindex(2, 3):
        torch.testing.assert_close(steps[index], norm.lmo(gradients[index]))
        torch.testing.assert_close(duals[index], norm.dual(gradients[index]))


@every_norm_and_shape
def test_the_step_does_not_depend_on_the_scale(norm, shape):
    gradient = in_band(*shape)
    step = norm.lmo(gradient)
    for scale in SCALES:
        torch.testing.assert_close(norm.lmo(gradient * scale), step, rtol=1e-4, atol=5e-5)
        scaled = norm.dual(gradient * scale)
        torch.testing.assert_close(scaled, norm.dual(gradient) * scale, rtol=1e-5, atol=0)


@every_norm_and_shape
def test_zeros_stay_zero(norm, shape):
    gradients = torch.stack([torch.zeros(shape), random_matrices(*shape)])
    steps, duals = norm.lmo(gradients), norm.dual(gradients)
    assert torch.equal(steps[0], torch.zeros(shape))
    assert duals[0] == 0
    torch.testing.assert_close(steps[1], norm.lmo(gradients[1]))


@every_norm_and_shape
def test_the_gradient_is_left_alone(norm, shape):
    gradient = random_matrices(*shape)
    before = gradient.clone()
    norm.lmo(gradient), norm.dual(gradient)
    assert torch.equal(gradient, before)


@every_norm_and_shape
def test_init_fills_with_the_step_of_an_exact_lmo_for_a_gaussian(norm, shape):
    weight = torch.full((3, *shape), torch.nan, requires_grad=True)
    assert norm.init_(weight, torch.Generator().manual_seed(5)) is weight
    for matrix, gaussian in zip(weight.detach(), random_matrices(3, *shape, seed=5), strict=True):
        assert primal(norm, matrix) == pytest.approx(1, rel=3e-6)
        assert inner(matrix, gaussian) == pytest.approx(dual(norm, gaussian), rel=3e-6)


@every_norm_and_shape
def test_larger_matrices_cost_more(norm, shape):
    rows, columns = shape
    assert 0 < norm.cost(rows, columns) < norm.cost(2 * rows, columns)
    assert norm.cost(rows, columns) < norm.cost(rows, 2 * columns)


@pytest.mark.parametrize("norm", EXACT_NORMS, ids=repr)
@settings(max_examples=8)
@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), data=st.data())
def test_no_point_of_the_ball_is_better(norm, shape, data):
    entries = st.lists(
        st.floats(-4, 4, width=32, allow_subnormal=False), min_size=math.prod(shape), max_size=36
    )
    gradient = torch.tensor(data.draw(entries)[: math.prod(shape)]).view(shape)
    point = torch.tensor(data.draw(entries)[: math.prod(shape)]).view(shape).double()
    point /= max(primal(norm, point), 1e-30)
    best = inner(gradient, norm.lmo(gradient))
    assert best <= inner(gradient, point) + 1e-5 * dual(norm, gradient)


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_a_gradient_that_is_not_finite_raises_nothing(norm):
    """The optimizer's check_finite names it; other workers must not wait for this one."""
    gradients = random_matrices(2, 6, 4)
    gradients[0, 2, 1] = torch.nan
    torch.testing.assert_close(norm.lmo(gradients)[1], norm.lmo(gradients[1]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "scaling, adjust_lr_fn", [("muon", "original"), ("moonlight", "match_rms_adamw")]
)
def test_bfloat16_steps_are_those_of_torch_muon(shape, scaling, adjust_lr_fn):
    """To the bit, but for the product with the scale."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = random_matrices(*shape)
    options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    torch.optim.Muon([weight], adjust_lr_fn=adjust_lr_fn, **options).step()
    norm = Spectral(scaling=scaling, dtype=torch.bfloat16)
    torch.testing.assert_close(norm.lmo(weight.grad), weight.detach(), rtol=1e-6, atol=0)
    if math.prod(shape) > 1:
        single = Spectral(scaling=scaling).lmo(weight.grad)
        assert (single - weight.detach()).norm() > 1e-3 * weight.detach().norm()


def test_moonlight_steps_have_the_rms_of_adamw():
    step = Spectral("svd", scaling="moonlight").lmo(random_matrices(40, 10))
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-5)


def test_the_exact_polar_factor_leaves_out_directions_without_gradient():
    gradient = with_singular_values(10, 20, np.array([1.0, 0.5]))
    values = np.linalg.svd(Spectral("svd", scaling="none").lmo(gradient), compute_uv=False)
    np.testing.assert_allclose(values, [1, 1] + 8 * [0], atol=1e-5)


@pytest.mark.parametrize("gap", [0, 1e-6, 1e-5, 1e-4, 3e-4, 3e-3, 1e-1])
@pytest.mark.parametrize("shape", [(40, 300), (200, 30)])
def test_the_nuclear_step_is_accurate_whatever_the_gap(shape, gap):
    others = np.linspace(1 - gap, 0, min(shape) - 1)
    for values in ([1, *others], [1] + (min(shape) - 1) * [1 - gap]):
        gradient = with_singular_values(*shape, np.array(values))
        step = Nuclear().lmo(gradient)
        assert -inner(gradient, step) > 1 - 3e-5
        np.testing.assert_allclose(primal(Nuclear(), step), 1, rtol=1e-5)


def test_a_vector_gets_the_rms_norm():
    gradient = random_matrices(9, 1)
    exact = -3 * gradient / gradient.norm()
    torch.testing.assert_close(BiasRMS().lmo(gradient), exact)
    torch.testing.assert_close(Spectral("svd").lmo(gradient), exact)
    step = Spectral().lmo(gradient) / exact
    torch.testing.assert_close(step, step[:1].expand(9, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_of_the_transpose_is_the_transpose_up_to_the_radius(shape):
    """sqrt(d_out / d_in) becomes its inverse."""
    gradient = in_band(*shape)
    expected = Spectral().lmo(gradient).T * (shape[1] / shape[0])
    torch.testing.assert_close(Spectral().lmo(gradient.T), expected, rtol=1e-4, atol=1e-5)


def test_init_starts_as_scion_does():
    """Orthogonal, signs, and unit columns and rows, with the factors of its code."""
    weights = {
        norm: norm.init_(torch.empty(20, 80), torch.Generator().manual_seed(1)).double()
        for norm in (Spectral(), Sign(), ColumnNorm(), RowNorm())
    }
    spectral, sign, columns, rows = weights.values()
    torch.testing.assert_close(spectral @ spectral.T, torch.eye(20).double() / 4, atol=1e-5, rtol=0)
    assert set(sign.unique().tolist()) == {-1 / np.float32(80), 1 / np.float32(80)}
    assert abs(sign.sum() * 80) < 5 * 40  # of 1600 fair coins, five standard deviations
    np.testing.assert_allclose(columns.norm(dim=0), math.sqrt(20), rtol=1e-6)
    np.testing.assert_allclose(rows.norm(dim=1), 1 / math.sqrt(80), rtol=1e-6)
    for weight in weights.values():  # no direction is preferred
        assert weight.mean().abs() < 5 * weight.std() / 40


def test_init_follows_its_generator_and_keeps_the_dtype():
    halves = [
        Spectral().init_(torch.empty(4, 6, dtype=torch.bfloat16), torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(halves[0], halves[1])
    assert not torch.equal(halves[0], halves[2])
    assert halves[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "norm, call",
    [
        (Spectral(), "Spectral()"),
        (Spectral("svd"), "Spectral(method='svd')"),
        (
            Spectral(steps=3, scaling="muon", dtype=torch.bfloat16),
            "Spectral(steps=3, scaling='muon', dtype=torch.bfloat16)",
        ),
        (Sign(), "Sign()"),
        (Sign("none"), "Sign(scaling='none')"),
        (Euclidean(), "Euclidean()"),
    ],
)
def test_norms_are_shown_as_they_are_built(norm, call):
    assert repr(norm) == call


def test_a_norm_of_your_own():
    class Half(Norm):
        def __init__(self, unused=3):
            super().__init__()

        def aligned(self, gradient):
            return gradient / 2

    gradient = random_matrices(3, 4)
    assert repr(Half()) == "Half()"
    torch.testing.assert_close(Half().lmo(gradient), -gradient / 2)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Spectral(steps=0), "steps=0: give at least 1"),
        (lambda: Spectral(steps=-1), "steps=-1: give at least 1"),
        (lambda: Spectral(steps=2.5), "steps=2.5: give at least 1"),
        (lambda: Spectral("express"), "'express': choose jordan, polar_express, svd"),
        (lambda: Spectral(dtype=torch.float16), "dtype=torch.float16: choose"),
        (lambda: Spectral(scaling="rms"), "'rms': choose scion, muon, moonlight, none"),
        (lambda: Sign("muon"), "Sign got scaling='muon': choose scion, none"),
        (lambda: ColumnNorm("muon"), "ColumnNorm got scaling='muon': choose scion, none"),
        (lambda: RowNorm("muon"), "RowNorm got scaling='muon': choose scion, none"),
        (lambda: Euclidean("scion"), "Euclidean got scaling='scion': choose none"),
        (lambda: Nuclear("scion"), "Nuclear got scaling='scion': choose none"),
        (lambda: L1("scion"), "L1 got scaling='scion': choose none"),
        (lambda: BiasRMS("none"), "BiasRMS got scaling='none': choose scion"),
        (lambda: AdaptiveRadius(-1, 1), "l0=-1: give a number"),
        (lambda: AdaptiveRadius(1, math.inf), "l1=inf: give a number"),
        (lambda: AdaptiveRadius(math.nan, 1), "l0=nan: give a number"),
        (lambda: AdaptiveRadius("1", 1), "l0=1: give a number"),
        (lambda: AdaptiveRadius(0, 0), "l0=0 and l1=0: give one above 0"),
    ],
)
def test_what_is_not_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@settings(max_examples=30)
@given(
    l0=st.just(0) | st.floats(1e-3, 1e3),
    l1=st.floats(1e-3, 1e3),
    duals=st.lists(st.just(0) | st.floats(1e-12, 1e12), min_size=1),
)
def test_the_adaptive_radius_is_that_of_gluon(l0, l1, duals):
    radii = AdaptiveRadius(l0, l1)(torch.tensor(duals))
    expected = [dual and dual / (l0 + l1 * dual) for dual in duals]
    np.testing.assert_allclose(radii, expected, rtol=1e-5)
    smooth = AdaptiveRadius(l1, 0)(torch.tensor(duals))
    np.testing.assert_allclose(smooth, np.array(duals) / l1, rtol=1e-5)


def test_the_adaptive_radius_is_shown_as_it_is_built():
    assert repr(AdaptiveRadius(0.5, 2)) == "AdaptiveRadius(l0=0.5, l1=2)"
