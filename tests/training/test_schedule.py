"""The learning rate, step by step."""

import pytest

from training.config import compose
from training.schedule import lr_factor


def test_the_learning_rate_is_a_trapezoid(small):
    overrides = ("steps=10", "schedule.warmup=0.2", "schedule.cooldown=0.5")
    config = compose((*small, *overrides)).config
    factors = [lr_factor(step, config) for step in range(11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])
