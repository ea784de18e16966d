"""Workers that come and go: whose messages do not count, and who is not let in."""

import logging
import threading
from datetime import timedelta

import fleet as crew
import pytest
import torch
import torch.distributed as dist
from bad_inputs import free_port
from fleet import Worker, lighthouse, parameters_of
from run import PATIENCE
from torch import nn

from ef21_muon import LocalSteps
from ef21_muon.compressors import Identity, Quantize, RankK, TopK
from ef21_muon.fleet import FleetRefused, connections
from ef21_muon.fleet.admission import Card
from ef21_muon.fleet.connections import StateServer
from ef21_muon.transport.reach import Place, is_local

SLOW = pytest.mark.slow
RUN = {"optimizer.lr": 0.01, "steps": 60}


def everyone(workers, until, before_step=lambda worker: None):
    """Train all together; returns their errors."""
    crew.enter(workers)
    threads = [worker.start(until, before_step=before_step) for worker in workers]
    for thread in threads:
        thread.join(PATIENCE)
    return [worker.error for worker in workers]


def breaks(number: int, steps: tuple[int, ...], how):
    """Before these steps, for a worker's `before_step`."""

    def before_step(worker):
        if worker.number == number and worker.optimizer.steps in steps:
            with torch.no_grad():
                how(worker)

    return before_step


def parameters_become(value):
    return lambda worker: next(iter(worker.model.parameters())).view(-1)[:1].fill_(value)


def a_liar(worker):
    parameters_become(torch.nan)(worker)
    worker.fleet.shared.broken = list


def error(worker):
    worker.optimizer.batches[0].state["error"].fill_(torch.inf)


WAYS = {
    "nan": (parameters_become(torch.nan), Identity()),
    "inf": (parameters_become(torch.inf), Identity()),
    "too large to square": (parameters_become(1e30), Identity()),
    "nan by signs": (parameters_become(torch.nan), Quantize("sign")),
    "nan by signs of whole messages": (parameters_become(torch.nan), Quantize("sign@tensor")),
    "nan in two bits": (parameters_become(torch.nan), Quantize("normal2")),
    "inf by rank": (parameters_become(torch.inf), RankK(0.3)),
    "what was left out": (error, TopK(0.3)),
    "without a word": (a_liar, Identity()),
}


@pytest.mark.parametrize(("how", "w2s"), WAYS.values(), ids=WAYS)
def test_what_is_not_finite_counts_for_nobody_and_its_sender_begins_anew(how, w2s, caplog):
    caplog.set_level(logging.WARNING, "ef21_muon")
    with lighthouse(3) as url, crew.workers(url, range(3), w2s=w2s, outer_momentum=0.6) as workers:
        assert everyone(workers, 12, breaks(1, (5,), how)) == [None] * 3
        for worker in workers:
            counted = [one.messages for one in worker.fleet.quorums]
            refused = [one.refused for one in worker.fleet.quorums]
            assert counted == [0, 3, 2, 3, 3] and refused == [(), (), (1,), (), ()]
            note = "worker 1's message is not finite: it does not count"
            assert [note in one.notes for one in worker.fleet.quorums][1:3] == [False, True]
            assert worker.fleet.synced_steps == 33
            for step in (3, 6, 9, 12):
                assert worker.global_params[step].isfinite().all()
                assert torch.equal(worker.global_params[step], workers[0].global_params[step])
        assert torch.isfinite(parameters_of(workers[1].model)).all()
    assert caplog.text.count("step 6: worker 1's message is not finite") == 3  # one on each


def test_it_ends_after_the_third_time_in_a_row_and_the_others_do_not():
    with lighthouse(2) as url, crew.workers(url, range(3)) as workers:
        steps = (1, 4, 7)
        errors = everyone(workers, 15, breaks(1, steps, parameters_become(torch.nan)))
        assert isinstance(errors[1], FleetRefused) and errors[::2] == [None, None]
        assert "worker 1's messages were not finite 3 times" in str(errors[1])
        assert torch.equal(workers[0].global_params[15], workers[2].global_params[15])
        assert workers[0].fleet.synced_steps == 3 * 10


@pytest.mark.parametrize("number", [0, 1])
def test_of_two_histories_that_of_finite_numbers_continues(number):
    """Whatever their digests, which decide between two workers else."""

    def how(worker):
        worker.optimizer.batches[0].state["global_params"].view(-1)[0] = torch.nan

    with lighthouse(2) as url, crew.workers(url, range(2)) as workers:
        assert everyone(workers, 12, breaks(number, (4,), how)) == [None, None]
        assert torch.equal(workers[0].global_params[12], workers[1].global_params[12])
        assert workers[0].global_params[12].isfinite().all()
        assert sum(one.diverged for one in workers[number].fleet.quorums) == 1


def test_where_no_message_is_finite_all_end_with_w_as_it_was():
    def how(worker):
        parameters_become(torch.nan)(worker)

    def before_step(worker):
        breaks(worker.number, (4,), how)(worker)

    with lighthouse(3) as url, crew.workers(url, range(3)) as workers:
        errors = everyone(workers, 12, before_step)
        assert all("no worker's message is finite after step 6" in str(error) for error in errors)
        for worker in workers:
            with worker.optimizer.global_params():
                assert torch.equal(parameters_of(worker.model), workers[0].global_params[3])


def test_a_message_far_longer_than_the_others_is_named_and_counts(caplog):
    caplog.set_level(logging.WARNING, "ef21_muon")

    def how(worker):
        for parameter in worker.model.parameters():
            parameter.mul_(1e6)

    with lighthouse(3) as url, crew.workers(url, range(3)) as workers:
        assert everyone(workers, 6, breaks(2, (2,), how)) == [None] * 3
        for worker in workers:
            _, first, _ = worker.fleet.quorums
            assert first.messages == 3 and not first.refused
            (note,) = first.notes
            assert note.startswith("worker 2's message is ") and "times as long" in note
    assert caplog.text.count("step 3: worker 2's message is") == 3


class Other(Worker):
    """Of another model, whose messages have another size."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.model = nn.Linear(7, 5)
        inner = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.optimizer = LocalSteps(inner, sync_every=3, transport=self.fleet)


def another_run(url, number):
    return Worker(number, url, run={"optimizer.lr": 0.02, "steps": 30})


def ahead_of_the_others(url, number):
    worker = another_run(url, number)
    state = {"synced_steps": 999, "step": 999, "batches_committed": 999}
    worker.fleet.load_state(state)
    return worker


NEWCOMERS = {
    "a number that is taken": (
        lambda url: Worker(1, url, run=RUN),
        "there is worker 1 on localhost (process ",
    ),
    "another run, at a later step": (
        lambda url: ahead_of_the_others(url, 0),
        "optimizer.lr=0.02 (theirs 0.01), steps=30 (theirs 60): start all workers alike",
    ),
    "another model": (
        lambda url: Other(2, url),
        "shape of parameter 0 of group 0=(5, 7) float32 (theirs ",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=SLOW if one == "another model" else ()) for one in NEWCOMERS]
)
def test_who_does_not_belong_is_shown_why_and_costs_the_others_one_quorum(name):
    newcomer, reason = NEWCOMERS[name]
    come, reported = threading.Event(), threading.Event()

    def wait(worker):
        if worker.optimizer.steps == 7 and not come.is_set():
            reported.set()
            come.wait(PATIENCE)

    with lighthouse(2) as url, crew.workers(url, range(2), run=RUN) as workers:
        crew.enter(workers)
        threads = [worker.start(18, before_step=wait) for worker in workers]
        reported.wait(PATIENCE)
        other = newcomer(url)
        thread = other.start(18)
        crew.wait_until_heard_of(other)
        come.set()
        for one in (*threads, thread):
            one.join(PATIENCE)
        assert isinstance(other.error, FleetRefused) and reason in str(other.error)
        assert "\n" not in str(other.error) and other.optimizer.steps == 0
        assert [worker.error for worker in workers] == [None, None]
        for worker in workers:
            tries = sorted(one.tries for one in worker.fleet.quorums)
            assert tries[:-1] == [1] * (len(tries) - 1) and tries[-1] == 2
            assert all(one.messages == 2 for one in list(worker.fleet.quorums)[1:])
            notes = [note for one in worker.fleet.quorums for note in one.notes]
            assert len(notes) == 1 and "is refused" in notes[0]
            assert torch.equal(worker.global_params[18], workers[0].global_params[18])


@SLOW
def test_of_numbers_that_are_given_twice_from_the_start_each_counts_once():
    with lighthouse(2) as url, crew.workers(url, (0, 1, 0, 1)) as workers:
        errors = everyone(workers, 12)
        let_in = [worker.number for worker, error in zip(workers, errors, strict=True) if not error]
        assert sorted(let_in) == [0, 1]
        assert all(isinstance(error, FleetRefused) for error in errors if error)
        for worker in (one for one in workers if one.error is None):
            assert {one.workers for one in worker.fleet.quorums} <= {(0, 1), (0,), (1,)}
            assert worker.fleet.synced_steps <= 24


def test_a_worker_that_starts_again_at_once_is_not_taken_for_another():
    with lighthouse(2) as url, crew.workers(url, range(2)) as workers:
        crew.enter(workers)
        thread = workers[0].start(18)
        workers[1].train(until=6)
        workers[1].fleet.leave()  # the lighthouse has yet to notice
        with crew.workers(url, [1]) as (again,):
            again.train(until=18)
            thread.join(PATIENCE)
            assert workers[0].error is None
            assert torch.equal(again.global_params[18], workers[0].global_params[18])


def test_state_travels_in_silence_and_never_by_a_proxy(monkeypatch, capfd):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://localhost:{free_port()}")
    server, client = (StateServer("localhost", timedelta(seconds=20)) for _ in range(2))
    state = {"user": {"default": {"tensors": [torch.arange(4.0)]}}}
    server.send_checkpoint([1], 3, state, timedelta(seconds=20))
    found = client.recv_checkpoint(0, server.metadata(), 3, timedelta(seconds=20))
    assert torch.equal(found["user"]["default"]["tensors"][0], torch.arange(4.0))
    server.shutdown()
    client.shutdown()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "host, named, rank",  # which has the store, or finds none there
    [
        *(("localhost", True, 0), ("127.0.0.1", True, 0), ("elsewhere", False, 0)),
        *(("127.0.0.2", True, 1), ("elsewhere", False, 1)),
    ],
)
def test_where_workers_are_to_meet_is_named_if_only_one_machine_has_it(
    host, named, rank, monkeypatch
):
    monkeypatch.setattr(connections, "is_local", lambda text: is_local(text) and named)
    address = host if named else "localhost"
    place = Place(host, "127.0.0.1", "network")
    group = connections.Group(
        1, timedelta(seconds=0.5), card=lambda: Card(rank, 1, 1.0, False, RUN, place)
    )
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
    port = free_port() if rank else store.port
    with pytest.raises(dist.DistError) as caught:
        group.configure(f"{address}:{port}/torchft/1/0", "worker", rank, 2, 1, 0, 1, [0, 1])
    found = f"the workers' store is at {address}:{port}, which other machines do not reach: if "
    assert (found in str(caught.value)) == named
    assert ("give each its address there, membership.host=ADDRESS (" in str(caught.value)) == named


@pytest.mark.parametrize(
    "host, local",
    [
        *[("localhost", True), ("127.0.0.1", True), ("127.0.1.1", True), ("::1", True)],
        *[("192.0.2.1", False), ("2001:db8::1", False), ("nope.invalid", False), ("a..b", False)],
    ],
)
def test_which_addresses_every_machine_has_for_itself(host, local):
    assert is_local(host) == local


def test_a_host_that_does_not_lead_here_is_refused(monkeypatch):
    monkeypatch.setattr("ef21_muon.fleet.members.PATIENCE", 0.5)
    for host in ("nope.invalid", "192.0.2.1"):
        with lighthouse(1) as url, crew.workers(url, [0]) as (worker,):
            worker.fleet.members.host = host
            with pytest.raises(FleetRefused, match=f"host={host} does not lead to this machine"):
                worker.train(until=3)
