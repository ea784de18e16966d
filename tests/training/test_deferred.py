"""Results that are collected some steps after they were asked for."""

from training.deferred import DeferredResults


def deferred(*steps):
    """Results asked for in these steps, and the list of those that were collected."""
    collected, results = [], DeferredResults(2)
    for step in steps:
        results.add(step, lambda step=step: collected.append(step))
    return results, collected


def test_results_are_collected_after_so_many_steps_in_order():
    results, collected = deferred(5, 6)
    results.collect(6, at_once=False)
    assert collected == []
    results.collect(7, at_once=False)
    assert collected == [5]
    results.collect(8, at_once=False)
    assert collected == [5, 6]


def test_all_results_are_collected_at_once_in_order_and_only_once():
    results, collected = deferred(5, 6, 7)
    results.collect(5, at_once=True)
    results.collect(9, at_once=True)
    assert collected == [5, 6, 7]
