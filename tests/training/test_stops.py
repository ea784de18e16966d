"""How often workers ask one another whether to stop, by how long their steps take."""

import pytest

from training import stops
from training.stops import SECONDS, StopRequests


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TwoWorkers:
    """This one and another, whose steps take so many times as long."""

    count = 2

    def __init__(self, factor: float = 1.0):
        self.asked_to_stop, self.factor = False, factor
        self.questions = 0

    def start_sum(self, asked, milliseconds):
        self.questions += 1
        return lambda: [float(asked), milliseconds * (1 + self.factor)]


@pytest.fixture
def train(monkeypatch):
    """Train up to a stop, which is asked for after `asked` steps; the steps until it is noticed."""

    def train(seconds, most: int, asked: int, workers: TwoWorkers, steps: int = 1000, eval_every=0):
        clock = Clock()
        monkeypatch.setattr(stops, "time", clock)
        own = StopRequests(workers, most)
        own.restart_clock()
        for step in range(1, steps + 1):
            own.ask()
            clock.now += seconds(step) if callable(seconds) else seconds
            evaluate = bool(eval_every) and step % eval_every == 0
            own.collect(at_once=evaluate)
            if own.requested:
                return step - asked
            if evaluate:
                clock.now += 1000
                own.restart_clock()
            workers.asked_to_stop = step >= asked
        return None

    return train


@pytest.mark.parametrize("seconds", [0.001, 0.3, 0.7, 1.0, 2.4, 4.0, 10.0])
@pytest.mark.parametrize("most", [1, 2, 4, 10])
def test_a_stop_is_noticed_within_seconds_of_work(train, seconds, most):
    for asked in range(20, 40):
        steps = train(seconds, most, asked, TwoWorkers())
        assert steps <= 1 or steps * seconds <= 1.5 * SECONDS + seconds
        assert steps <= 1.5 * most + 1


@pytest.mark.parametrize(
    ("seconds", "most", "questions"),
    [(0.001, 10, 10), (0.5, 10, 10), (0.001, 4, 25), (0.001, 1, 100), (1.0, 10, 20), (5, 10, 99)],
)
def test_short_steps_cost_no_more_questions_than_one_every_most(train, seconds, most, questions):
    workers = TwoWorkers()
    assert train(seconds, most, 1000, workers, steps=100) is None
    assert workers.questions == questions


def test_steps_that_become_slow_are_noticed_with_the_next_answer(train):
    """The first step, in which much is compiled, is none of the usual."""
    workers = TwoWorkers()
    assert train(lambda step: 0.1 if step < 50 else 4.0, 10, 100, workers) <= 2
    workers = TwoWorkers()
    train(lambda step: 60.0 if step == 1 else 0.1, 10, 1000, workers, steps=100)
    assert workers.questions <= 12


@pytest.mark.parametrize("eval_every", [1, 3, 10])
def test_evaluations_are_not_taken_for_steps(train, eval_every):
    workers = TwoWorkers()
    train(0.001, 10, 1000, workers, steps=100, eval_every=eval_every)
    assert workers.questions <= (99 if eval_every == 1 else 11)
    assert train(0.001, 10, 50, TwoWorkers(), eval_every=eval_every) <= 16


def test_a_slow_worker_counts_as_much_as_a_fast_one(train):
    assert train(1.0, 10, 50, TwoWorkers(factor=9.0)) <= 2
