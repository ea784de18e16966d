"""What a run remembers between records: losses and steps, also of other numbers of workers."""

from types import SimpleNamespace

import pytest
import torch

from training.progress import OPTIMIZER_PHASES, Progress


class Crew:
    """In place of the workers: one of `count`, and what it brings to sums over all."""

    def __init__(self, rank, count, states=None):
        self.rank, self.count, self.device = rank, count, torch.device("cpu")
        self.states, self.brought = states, []

    def gather(self, value):
        self.states.append(value)
        return self.states

    def start_sum(self, loss, broken):
        self.brought.append(float(loss))
        return lambda: [float(loss), float(broken)]


def progress(rank, count, states=None):
    optimizer = SimpleNamespace(check_finite=lambda: None)
    crew = Crew(rank, count, states)
    return Progress(crew, optimizer, tokens_per_step=1, synced_steps=lambda step: step)


def told(one):
    """What a worker brings to the mean loss of all."""
    one.start_record({}, lambda record: None)
    return one.workers.brought[-1]


def facts(**more):
    phases = dict.fromkeys(("data", "forward_backward", *OPTIMIZER_PHASES), 1.0)
    return {"position": {"seconds": 7.5}, "phases": phases, **more}


def test_a_record_is_of_the_mean_over_workers_and_steps_since_the_last():
    workers = [progress(rank, 2) for rank in range(2)]
    for losses in ((3.0, 5.0), (1.0, 2.0)):
        for one, loss in zip(workers, losses, strict=True):
            one.count_step(torch.tensor(loss))
    assert sum(map(told, workers)) == pytest.approx((3 + 5 + 1 + 2) / 4)
    for one in workers:
        one.count_step(torch.tensor(6.0))
    assert sum(map(told, workers)) == pytest.approx(6.0), "of steps after the record alone"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_was_since_the_record_goes_on_with_any_number_of_workers(count):
    states = []
    for rank, losses in enumerate(((3.0, 1.0), (5.0, 2.0))):
        before = progress(rank, 2, states)
        for loss in losses:
            before.count_step(torch.tensor(loss))
        saved = before.state()["since_record"]
    assert saved == [[4.0, 2], [7.0, 2]]
    workers = [progress(rank, count) for rank in range(count)]
    for one in workers:
        one.resume(facts(since_record=saved))
        one.count_step(torch.tensor(2.5))
    assert sum(map(told, workers)) == pytest.approx(((4 + 7) / 2 + 2.5) / 3)
    assert workers[0].seconds == 7.5 and workers[0].optimizer_share == pytest.approx(4 / 6)


def test_a_checkpoint_of_an_earlier_version_begins_with_nothing():
    one = progress(0, 1)
    one.resume(facts())
    one.count_step(torch.tensor(2.5))
    assert told(one) == 2.5
