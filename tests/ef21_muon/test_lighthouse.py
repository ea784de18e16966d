"""The lighthouse: how it is asked, how long it is waited for, and what is said of it."""

import threading
import time

import fleet as crew
import pytest
import torch
from bad_inputs import free_port
from fleet import LighthouseProcess, lighthouse
from run import PATIENCE

from ef21_muon.fleet import FleetError, connections, members
from ef21_muon.fleet.connections import Lighthouse

URL = "http://localhost:1"


@pytest.mark.parametrize("quiet", [False, True])
def test_each_time_it_is_away_for_long_one_line_says_so_and_one_that_it_answers(
    quiet, monkeypatch, caplog
):
    lighthouse, times = Lighthouse(URL, quiet), [200.0, 205.0, 210.0, 215.0, 230.0]
    for _ in range(2):
        clock = iter(times)
        monkeypatch.setattr(connections.time, "monotonic", lambda clock=clock: next(clock))
        assert [lighthouse.note_silence() for _ in times] == [0, 5, 10, 15, 30]
        monkeypatch.undo()
        lighthouse.note_answer()
    away = f"no answer of the lighthouse {URL} so far: waiting for it"
    assert caplog.messages == ([] if quiet else [away, f"the lighthouse {URL} answers"] * 2)


def test_a_short_absence_is_not_worth_a_line(caplog):
    lighthouse = Lighthouse(URL, quiet=False)
    assert lighthouse.note_silence() == 0 and lighthouse.note_silence() < 1
    lighthouse.note_answer()
    assert not caplog.messages


def test_a_lighthouse_that_starts_later_is_waited_for_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(members, "PATIENCE", 1.0)
    monkeypatch.setattr(connections, "SILENCE", 0.5)
    port = free_port()
    url = f"http://localhost:{port}"
    with crew.workers(url, [0]) as (worker,):
        thread, until = worker.start(3), time.monotonic() + PATIENCE
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
        late = LighthouseProcess(1, port)
        thread.join(PATIENCE)
        late.end()
        assert worker.error is None and worker.optimizer.steps == 3
    assert caplog.messages == [
        f"no answer of the lighthouse {url} so far: waiting for it",
        f"the lighthouse {url} answers",
    ]


def test_without_a_lighthouse_it_says_so():
    url = f"http://localhost:{free_port()}"
    with (
        crew.workers(url, [0], patience=1) as (worker,),
        pytest.raises(FleetError, match=f"no answer of the lighthouse {url}"),
    ):
        worker.train(until=3)


def test_the_thread_that_asks_for_a_quorum_has_the_models_device(monkeypatch):
    """Torchft waits for that thread's device before it serves W: a GPU's number may not be 0."""
    set_in, asked = [], []

    def set_device(device):
        set_in.append((device, threading.current_thread()))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    device = torch.device("cuda", 1)
    thread = connections.in_daemon(threading.current_thread, device).result(PATIENCE)
    assert set_in == [(device, thread)] and thread is not threading.current_thread()

    def in_daemon(call, device):
        asked.append(device)
        return connections.in_daemon(call, device)

    monkeypatch.setattr(members, "in_daemon", in_daemon)
    with lighthouse(1) as url, crew.workers(url, [0]) as (worker,):
        worker.train(until=3)
    assert set(asked) == {torch.device("cpu")} and len(set_in) == 1
