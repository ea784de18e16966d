"""The learning rate, step by step."""

import pytest

from training.config import compose
from training.schedule import Later, due, lr_factor


def test_the_learning_rate_is_a_trapezoid(small):
    overrides = ("steps=10", "schedule.warmup=0.2", "schedule.cooldown=0.5")
    config = compose((*small, *overrides)).config
    factors = [lr_factor(step, config) for step in range(11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_what_is_due_every_step_is_due_in_each_and_what_is_never_in_none():
    assert [step for step in range(1, 7) if due(step, 1)] == [1, 2, 3, 4, 5, 6]
    assert [step for step in range(1, 7) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(1, 7))


def test_what_waits_is_done_so_many_steps_later_in_order():
    done, later = [], Later(2)
    for step in (5, 6):
        later.add(step, lambda step=step: done.append(step))
    later.settle(6)
    assert done == []
    later.settle(7)
    assert done == [5]
    later.settle(8)
    assert done == [5, 6]
