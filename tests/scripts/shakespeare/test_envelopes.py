"""The envelopes of README's picture: the lowest loss for each number of bytes."""

import numpy as np
import pytest

from scripts.shakespeare.envelopes import METHODS, envelope, of_method
from scripts.shakespeare.results import RESULTS, read

LINES = [
    [(1.0, 3.0), (4.0, 2.0), (16.0, 1.5)],
    [(2.0, 2.2), (8.0, 2.1)],  # ahead at first, and ends early
    [(3.0, 2.9), (32.0, 1.6)],  # never ahead
]


def lowest(x):
    """At x, with at most as many bytes: losses of LINES fall, and last when a line has ended."""
    of_lines = [
        np.interp(np.log(x), np.log([size for size, _ in line]), [loss for _, loss in line])
        for line in LINES
        if line[0][0] <= x
    ]
    return min(of_lines)


def test_it_is_the_best_of_all_lines_at_their_points():
    found = dict(envelope(LINES))
    assert found[1.0] == 3.0 and found[2.0] == 2.2 and found[16.0] == 1.5
    assert found[4.0] == 2.0 and 32.0 not in found
    for x, loss in found.items():
        assert loss == pytest.approx(lowest(x))


def test_bytes_rise_and_losses_never_do():
    xs, losses = np.array(envelope(LINES)).T
    assert (np.diff(xs) > 0).all() and (np.diff(losses) <= 0).all()
    assert losses[-1] == 1.5


def test_every_method_of_the_picture_that_has_runs_reaches_their_best_loss():
    results = read(RESULTS)
    assert len(METHODS) == 11
    have_runs = [method for method in METHODS if of_method(results, method)]
    assert len(have_runs) >= 10
    for method in have_runs:
        runs = [result.by_both for result in of_method(results, method)]
        assert envelope(runs)[-1][1] == min(loss for run in runs for _, loss in run)
