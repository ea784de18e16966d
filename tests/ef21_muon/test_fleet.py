"""Workers that come and go: threads with a lighthouse, against a plain simulation."""

import copy
import signal
import threading
import time

import fleet as crew
import pytest
import torch
from bad_inputs import free_port
from fleet import (
    DATA,
    LighthouseProcess,
    Worker,
    gradient,
    lighthouse,
    new_model,
    parameters_of,
)
from preloaded import forking
from run import PATIENCE, ROOT, script

from ef21_muon import LocalSteps
from ef21_muon.compressors import Quantize, TopK
from ef21_muon.fleet import Fleet, FleetRefused, connections, members
from ef21_muon.fleet.verdict import HEADER

EVERY = 3


def train_all(workers, *arguments, **options):
    threads = [worker.start(*arguments, **options) for worker in workers]
    for thread in threads:
        thread.join(PATIENCE)
    errors = [worker.error for worker in workers if worker.error]
    if errors:
        raise errors[0]


def simulated(numbers: dict[int, tuple[int, ...]], until: int, momentum: float = 0.0):
    """W after every round, by its step: plain averages of plain SGD steps, with Nesterov outside.

    numbers: of every round the workers whose steps count.
    """
    shared, outer = [p.detach().clone() for p in new_model().parameters()], None
    found = {}
    for first in range(0, until, EVERY):
        ends = []
        for number in numbers[first // EVERY]:
            model = new_model()
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), shared, strict=True):
                    parameter.copy_(value)
            for step in range(first, first + EVERY):
                gradient(model, number, step)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.1 * parameter.grad
            ends.append([p.detach() for p in model.parameters()])
        means = [torch.stack(one).mean(0) for one in zip(*ends, strict=True)]
        moves = [w - mean for w, mean in zip(shared, means, strict=True)]
        outer = outer or [torch.zeros_like(d) for d in moves]
        outer = [momentum * v + d for v, d in zip(outer, moves, strict=True)]
        shared = [w - d - momentum * v for w, d, v in zip(shared, moves, outer, strict=True)]
        found[first + EVERY] = torch.cat([w.flatten() for w in shared])
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_undisturbed_they_are_the_mean_of_their_steps(momentum):
    with lighthouse(3) as url, crew.workers(url, range(3), outer_momentum=momentum) as workers:
        train_all(workers, until=12)
        expected = simulated(dict.fromkeys(range(4), (0, 1, 2)), 12, momentum)
        assert workers[0].global_params.keys() == expected.keys()
        for worker in workers:
            for step, model in expected.items():
                torch.testing.assert_close(worker.global_params[step], model, rtol=0, atol=1e-5)
                assert torch.equal(worker.global_params[step], workers[0].global_params[step])
            assert worker.fleet.synced_steps == 36


def test_what_a_round_takes_is_counted():
    compressor = Quantize("normal2")
    with lighthouse(3) as url, crew.workers(url, range(3), w2s=compressor) as workers:
        train_all(workers, until=6)
        shapes = [(8, DATA), (8, 1), (2, 8), (2, 1)]
        size = sum(compressor.fit(*shape).payload_bytes(*shape) for shape in shapes)
        for worker in workers:
            optimizer, met = worker.optimizer, len(worker.fleet.quorums)
            assert met == 3 and all(one.tries == 1 for one in worker.fleet.quorums)
            assert optimizer.w2s_bytes == met * size
            assert optimizer.received_bytes == met * 2 * size
            assert optimizer.wire_tx_bytes == met * 2 * (size + HEADER.size)


def test_they_continue_without_one_and_one_joins_them():
    gone, back = threading.Event(), threading.Event()

    def wait_for_the_joiner(worker):
        if worker.optimizer.steps == 9:  # so that the rounds which it joins are known
            back.wait(PATIENCE)

    with lighthouse(2) as url, crew.workers(url, range(3), outer_momentum=0.6) as workers:
        threads = [one.start(18, before_step=wait_for_the_joiner) for one in workers[:2]]
        workers[2].train(until=6)
        workers[2].fleet.leave()
        gone.set()
        with crew.workers(url, [2], outer_momentum=0.6) as (joiner,):
            thread = joiner.start(18)
            crew.wait_until_heard_of(joiner)
            back.set()
            for one in (*threads, thread):
                one.join(PATIENCE)
            counted = crew.who_counted([*workers, joiner])
            # Who stands still for long enough, on a busy machine, misses a round as well.
            assert 2 not in counted[2] and 2 in counted[5]
            expected = simulated(counted, 18, 0.6)
            for worker in (*workers[:2], joiner):
                assert worker.error is None
                for step, model in worker.global_params.items():
                    torch.testing.assert_close(model, expected[step], rtol=0, atol=1e-5)
                assert torch.equal(worker.global_params[18], joiner.global_params[18])
                assert worker.fleet.synced_steps == EVERY * sum(map(len, counted.values()))
            assert joiner.fleet.quorums[0].healed
            assert joiner.fleet.state() == workers[0].fleet.state()


@pytest.mark.parametrize("table", ["global_params", "server_momentum"])
def test_another_history_is_noticed_and_never_averaged(table):
    def part(worker):
        if worker.number == 1 and worker.optimizer.steps == 4:
            worker.optimizer.batches[0].state[table].add_(1e-4)

    with lighthouse(3) as url, crew.workers(url, range(3), outer_momentum=0.6) as workers:
        train_all(workers, until=15, before_step=part)
        met = workers[1].fleet.quorums
        diverged = [place for place, one in enumerate(met) if one.diverged]
        assert len(diverged) == 1 and met[diverged[0]].healed
        for step in (9, 12, 15):
            models = [one.global_params[step] for one in workers if step in one.global_params]
            assert len(models) >= 2
            assert all(torch.equal(model, models[0]) for model in models)
        assert not any(one.diverged for one in workers[0].fleet.quorums)


def test_a_lighthouse_that_starts_again_is_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(connections, "SILENCE", 0.3)
    monkeypatch.setattr(connections, "CHECK_EVERY", 0.2)
    port = free_port()
    first = LighthouseProcess(2, port)
    url = f"http://localhost:{port}"
    with crew.workers(url, range(2)) as workers:
        train_all(workers, until=6)
        first.end()
        threads = [worker.start(12, joins=False) for worker in workers]
        while not all(worker.optimizer.steps == 9 for worker in workers):  # they wait for it
            time.sleep(0.01)
        until = time.monotonic() + PATIENCE
        while caplog.text.count("no answer of the lighthouse") < 2 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(1)
        second = LighthouseProcess(2, port)
        for thread in threads:
            thread.join(PATIENCE)
        second.end()
        assert [worker.error for worker in workers] == [None, None]
        lines = [f"no answer of the lighthouse {url} so far: waiting for it"] * 2
        assert caplog.messages == lines + [f"the lighthouse {url} answers"] * 2
        expected = simulated(dict.fromkeys(range(4), (0, 1)), 12)
        for worker in workers:
            assert torch.equal(worker.global_params[12], workers[0].global_params[12])
            torch.testing.assert_close(worker.global_params[12], expected[12], rtol=0, atol=1e-5)


def test_what_waits_can_be_ended():
    def end(seconds):
        raise InterruptedError

    with lighthouse(2) as url, crew.workers(url, [0]) as (worker,):
        worker.fleet.members.while_waiting = end
        with pytest.raises(InterruptedError):
            worker.fleet.join()


def test_a_worker_that_is_built_otherwise_is_refused():
    with lighthouse(2) as url, crew.workers(url, range(2)) as workers:
        threads = [worker.start(30) for worker in workers]
        other = Worker(2, url, outer_lr=0.7)
        thread = other.start(30)
        for one in (thread, *threads):
            one.join(PATIENCE)
        assert isinstance(other.error, FleetRefused)
        assert "outer_lr=0.7 (theirs 1.0)" in str(other.error)


def test_a_whole_fleet_resumes_from_the_newest_round_of_any():
    states = {}

    def keep(worker):
        for number, step in ((0, 7), (1, 4)):
            if worker.number == number and worker.optimizer.steps == step:
                optimizer, model = worker.optimizer, worker.model
                saved = model.state_dict(), optimizer.state_dict(), worker.fleet.state()
                states[number] = copy.deepcopy(saved)

    with lighthouse(2) as url:
        with crew.workers(url, range(2), outer_momentum=0.6) as workers:
            train_all(workers, until=12, before_step=keep)
            expected = workers[0].global_params
        with crew.workers(url, range(2), outer_momentum=0.6) as workers:
            for worker in workers:
                of_model, of_optimizer, of_fleet = states[worker.number]
                worker.model.load_state_dict(of_model)
                worker.optimizer.load_state_dict(of_optimizer)
                worker.fleet.load_state(of_fleet)
            train_all(workers, until=12)
            assert workers[1].fleet.quorums[0].healed
            assert torch.equal(workers[0].global_params[12], workers[1].global_params[12])
            assert workers[0].fleet.synced_steps == 24
            # The one behind was at W after two rounds, and has made its third anew.
            assert not torch.equal(workers[0].global_params[12], expected[9])


def test_what_is_remembered_of_a_lost_message_is_forgotten():
    with lighthouse(2) as url, crew.workers(url, range(2), w2s=TopK(0.1)) as workers:
        train_all(workers, until=6)
        optimizer = workers[0].optimizer
        assert any(batch.state["error"].any() for batch in optimizer.batches)
        workers[0].fleet.shared.adopt(workers[1].fleet.shared.state())
        assert not any(batch.state["error"].any() for batch in optimizer.batches)


# A last round that is whole, and one that is cut short.
@pytest.mark.parametrize("until", [pytest.param(12, marks=pytest.mark.slow), 14])
def test_who_is_lost_in_the_last_round_comes_to_the_same_end(until):
    finished = threading.Event()
    with lighthouse(2) as url, crew.workers(url, range(3), outer_momentum=0.6) as workers:

        def end(worker):
            worker.train(until)
            worker.optimizer.final_sync()
            finished.set()
            worker.fleet.quorums.clear()  # as one does that has logged them
            worker.fleet.wait_for_peers(3, PATIENCE)

        crew.enter(workers)
        threads = [threading.Thread(target=end, args=(worker,)) for worker in workers[:2]]
        for thread in threads:
            thread.start()
        workers[2].train(until=10)
        workers[2].fleet.leave()
        assert finished.wait(PATIENCE)
        time.sleep(0.5)
        with crew.workers(url, [2], outer_momentum=0.6) as (late,):
            end(late)
            for thread in threads:
                thread.join(PATIENCE)
            found = []
            for worker in (*workers[:2], late):
                assert worker.optimizer.steps == until
                with worker.optimizer.global_params():
                    found.append(parameters_of(worker.model))
            assert all(torch.equal(model, found[0]) for model in found)
            rounds = [(0, 1, 2)] * 3 + [(0, 1)] * (-(-until // EVERY) - 3)
            steps = [min(EVERY, until - EVERY * place) for place in range(len(rounds))]
            synced = sum(len(who) * length for who, length in zip(rounds, steps, strict=True))
            assert {w.fleet.synced_steps for w in (*workers[:2], late)} == {synced}


def test_one_that_stands_still_in_a_message_is_not_waited_for_as_long_as_a_state_takes(monkeypatch):
    monkeypatch.setattr(members, "PATIENCE", 1.0)
    monkeypatch.setattr(members, "SLOWEST", 1.0)  # bytes a second: a state takes minutes
    pauses = iter([3])  # seconds, before the first message alone

    def stand_still(worker):
        if worker.number == 1 and worker.optimizer.steps == 8:
            own = worker.fleet.members
            send = own._send
            monkeypatch.setattr(own, "_send", lambda *a: time.sleep(next(pauses, 0)) or send(*a))

    with lighthouse(2) as url, crew.workers(url, range(2)) as workers:
        start = time.monotonic()
        threads = [worker.start(12, before_step=stand_still) for worker in workers]
        while workers[0].fleet.members.manager is None or workers[0].optimizer.steps < 8:
            time.sleep(0.01)
        for thread in threads:
            thread.join(PATIENCE)
        assert time.monotonic() - start < 60
        assert [worker.error for worker in workers] == [None, None]
        assert max(one.tries for one in workers[0].fleet.quorums) > 1
        assert torch.equal(workers[0].global_params[12], workers[1].global_params[12])


def test_after_any_number_of_tries_a_message_is_waited_for_in_vain_no_longer_than_a_clock_has():
    with lighthouse(1) as url, crew.workers(url, [0]) as (worker,):
        worker.fleet.join()
        own, packed = worker.fleet.members, torch.arange(40, dtype=torch.uint8)
        own.longest = 0.0
        assert torch.equal(own._send(packed, tries=5000), packed[None])


def test_workers_draw_their_own_random_numbers():
    def generator(worker, seed=0):
        inner = torch.optim.SGD(new_model().parameters(), lr=0.1)
        optimizer = LocalSteps(inner, seed=seed, transport=Fleet(worker, "http://localhost:1"))
        return torch.rand(4, generator=optimizer.generators["w2s"])

    assert torch.equal(generator(1), generator(1))
    assert not torch.equal(generator(1), generator(2))


def test_another_run_is_another_history():
    def digest(run):
        inner = torch.optim.SGD(new_model().parameters(), lr=0.1)
        fleet = Fleet(0, "http://localhost:1", run=run)
        LocalSteps(inner, transport=fleet)
        return fleet.digest()

    assert digest({"a": 1}) == digest({"a": 1}) != digest({"a": 2})


REFUSED = {
    "server": ({"server": "sharded"}, "server='sharded' is not allowed"),
    "streaming": ({"streaming": True}, "^streaming=True is not allowed"),
    "sync_delay": ({"sync_delay": 1}, "^sync_delay=1 is not allowed"),
    "both": (
        {"streaming": True, "sync_delay": 1},
        "^streaming=True with sync_delay=1 is not allowed",
    ),
    "feedback": ({"feedback": "ef21"}, "feedback='ef21' is not allowed"),
    "s2w": ({"s2w": TopK(0.5)}, "s2w"),
    "sync_every": ({"sync_every": 0}, "sync_every=0 is not allowed"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_continue_without_a_member_is_refused(options, message):
    inner = torch.optim.SGD(new_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        LocalSteps(inner, **options, transport=Fleet(0, "http://localhost:1"))


def test_a_worker_is_not_copied():
    inner = torch.optim.SGD(new_model().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(LocalSteps(inner, transport=Fleet(0, "http://localhost:1")))


def test_alone_it_is_local_steps():
    with lighthouse(1) as url, crew.workers(url, [0], w2s=TopK(0.3)) as (worker,):
        worker.train(until=12)
        model = new_model()
        inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
        optimizer = LocalSteps(inner, sync_every=3, w2s=TopK(0.3))
        for step in range(12):
            gradient(model, 0, step)
            optimizer.step()
        with optimizer.global_params():
            assert torch.equal(parameters_of(model), worker.global_params[12])


@pytest.mark.parametrize(("until", "more"), [(12, 0), (13, 1)])
def test_the_end_of_a_run_sends_what_was_not_sent(until, more):
    """A last round that is whole was sent."""
    with lighthouse(1) as url, crew.workers(url, [0]) as (worker,):
        worker.train(until=until)
        met = len(worker.fleet.quorums)
        worker.optimizer.final_sync()
        assert len(worker.fleet.quorums) == met + more
        assert worker.fleet.synced_steps == until


ENDS = """
import sys
import torch
from ef21_muon import LocalSteps
from ef21_muon.fleet import Fleet

def tired(seconds):
    raise KeyboardInterrupt

model = torch.nn.Linear(2, 2)
inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
fleet = Fleet(0, sys.argv[1], while_waiting=tired)
LocalSteps(inner, sync_every=1, transport=fleet)
fleet.join()
"""


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_process_that_ends_while_it_waits_for_others_ends(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "ends.py").write_text(ENDS)
    status = -signal.SIGINT if fresh or not forking() else 1
    with lighthouse(2) as url:
        ended = script(tmp_path / "ends.py", url, expect=status, fresh=fresh)
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"
