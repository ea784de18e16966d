"""Quantisation in a diagonal geometry against a float64 transcription; blocks by their number."""

import numpy as np
import pytest
import reference
import torch
from matrices import seeded

from ef21_muon.compressors.base import value_format
from ef21_muon.values import Integer, RowColumn

SHAPE = (12, 40)
DRAWS = 4096


def matrix(kind="linear layer"):
    """Entries as gradients of a linear layer have them: sizes of rows times sizes of columns."""
    x = torch.randn(*SHAPE, generator=seeded(1))
    if kind == "linear layer":
        x *= torch.logspace(0, -2, SHAPE[0])[:, None] * torch.logspace(-2, 0, SHAPE[1])
    if kind == "one huge entry":
        x[3, 5] = 1e4
    if kind == "one row":
        x[1:] *= 1e-3
    return x


KINDS = ("linear layer", "noise", "one huge entry", "one row")


def through(values, x, draws=1):
    """x (m, n) encoded and decoded so many times, each with its own random numbers."""
    payload = values.encode(x.expand(draws, *x.shape), seeded())
    return values.decode(payload, *x.shape).double().numpy()


def diagonal(x):
    """D of the docstring, in float64, of maxima that are rounded as they are sent; (1, n)."""
    return reference.bfloat16(np.abs(x).max(0, keepdims=True))


def multiples(x, bits):
    """D^(-1/2) x in steps of the integers, and what a step of each entry is."""
    root = np.sqrt(diagonal(x))
    step = np.abs(x / root).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    return x / root / step, root * step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_nearest_is_that_of_the_transcription(bits, kind):
    x = matrix(kind)
    steps, of_step = multiples(x.double().numpy(), bits)
    (found,) = through(RowColumn(bits, rounding="nearest"), x)
    off = np.abs(steps - np.floor(steps) - 0.5) > 1e-4  # not halfway
    np.testing.assert_allclose(found[off], (np.round(steps) * of_step)[off], rtol=1e-5)
    assert off.mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_unbiased_and_their_variance_is_the_predicted_one(kind):
    x = matrix(kind)
    steps, of_step = multiples(x.double().numpy(), 3)
    share = steps - np.floor(steps)
    variance = share * (1 - share) * of_step**2
    draws = through(RowColumn(3), x, DRAWS)
    off = np.abs(draws.mean(0) - x.double().numpy())
    assert (off <= 6 * np.sqrt(variance / DRAWS) + 12 * of_step / DRAWS).all()
    assert draws.var(0).sum() == pytest.approx(variance.sum(), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_variance_is_within_omega_and_in_the_norm_of_d_within_that_of_integers(bits, kind):
    x = matrix(kind)
    values, exact = RowColumn(bits), x.double().numpy()
    squares = (through(values, x, DRAWS) - exact) ** 2
    assert squares.mean(0).sum() <= values.omega(*SHAPE) * (exact**2).sum()
    in_norm = (squares.mean(0) / diagonal(exact)).sum()
    of_integers = Integer(bits).omega(*SHAPE)
    assert in_norm <= of_integers * (exact**2 / diagonal(exact)).sum()


def test_omega_has_the_root_of_what_one_scale_a_message_has():
    """Where one entry has the size and the others are small, that one loses more than it."""
    x = torch.full(SHAPE, 1 / np.sqrt(SHAPE[0] * SHAPE[1]))
    x[0, 0] = 1.0
    losses = {}
    for values in (RowColumn(2), Integer(2, block="tensor")):
        squares = (through(values, x, 256) - x.double().numpy()) ** 2
        losses[str(values)] = squares.mean(0).sum() / x.double().square().sum().item()
    bound = RowColumn(2).omega(*SHAPE)
    assert losses["rowcol2"] < bound < losses["int2@tensor"]
    total = SHAPE[0] * SHAPE[1]
    assert bound == pytest.approx(total**0.25, rel=0.02)
    assert RowColumn(8).omega(*SHAPE) == pytest.approx(total**0.5 / (4 * 127**2), rel=0.02)


@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e36])
def test_zeros_and_sizes_of_float32(scale):
    x = scale * matrix()
    x[2], x[:, 7] = 0, 0
    (found,) = through(RowColumn(8), x)
    assert np.isfinite(found).all() and not found[2].any() and not found[:, 7].any()
    lost = np.square(found / scale - x.double().numpy() / scale).sum()
    assert lost < 1e-3 * np.square(x.double().numpy() / scale).sum()
    assert not through(RowColumn(4), torch.zeros(3, 5)).any()


def test_numbers_that_are_not_finite_stay_so():
    x = matrix()
    x[4, 4] = float("nan")
    assert np.isnan(through(RowColumn(4), x)[0, 4]).all()


@pytest.mark.parametrize(
    ("count", "blocks"),
    [(1, (1, 480)), (8, (8, 60)), (7, (7, 69)), (480, (480, 1)), (999, (480, 1))],
)
def test_blocks_by_their_number_are_those_of_their_length(count, blocks):
    by_number, by_length = value_format(f"int4@{count}blocks"), value_format(f"int4@{blocks[1]}")
    assert by_number.blocks(*SHAPE) == by_length.blocks(*SHAPE) == blocks
    assert str(by_number) == f"int4@{count}blocks"
    x = matrix()[None]
    assert torch.equal(by_number.encode(x, seeded()), by_length.encode(x, seeded()))


def test_n_blocks_promise_n_times_less_where_steps_are_fine():
    one = Integer(8, block="1blocks").omega(64, 64)
    assert [one / Integer(8, block=f"{n}blocks").omega(64, 64) for n in (2, 8)] == [2, 8]
