"""Workers that share a store: how they agree on a name, and who of them is lost."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from run import PATIENCE
from waiting import SleptTime

from ef21_muon.transport.reach import Place
from training.workers import FinalError, RunError, Workers, by_host_alone


class Start:
    """Workers that share a store, as threads."""

    def __init__(self, store: dist.Store, count: int, timeout: float = PATIENCE):
        self.workers = []
        for rank in range(count):
            worker = Workers(timeout)
            worker.rank, worker.count, worker._store = rank, count, store
            self.workers.append(worker)

    def results(self, action, ranks) -> list:
        """Of all of these ranks at once: what the action returns or raises."""
        results = {}

        def run(rank):
            try:
                results[rank] = action(self.workers[rank])
            except TimeoutError as error:
                results[rank] = str(error)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        return [results[rank] for rank in ranks]


def test_every_start_agrees_on_a_name_of_its_own():
    store, names = dist.HashStore(), set()
    for _ in range(5):
        for order in ((0, 1, 2), (2, 1, 0)):
            (name,) = set(Start(store, 3).results(lambda w: w._agree_on_name(store), order))
            names.add(name)
    assert len(names) == 10


def test_workers_that_do_not_start_are_named(monkeypatch):
    store = dist.HashStore()
    Start(store, 4).results(lambda worker: worker._agree_on_name(store), range(4))
    monkeypatch.setattr("training.workers.time", SleptTime(threads=2))
    errors = Start(store, 4, 0.2).results(lambda worker: worker._agree_on_name(store), (0, 3))
    assert [error.split(":")[0] for error in errors] == 2 * ["rank 1, 2 did not start within 0.2 s"]


def test_who_is_lost(monkeypatch):
    monkeypatch.setattr("training.workers.time", SleptTime(threads=3))
    answers = Start(dist.HashStore(), 5, 0.5).results(Workers._lost, (0, 2, 4))
    assert answers == 3 * [[1, 3]]


def test_if_the_store_does_not_answer_its_node_is_lost():
    class Silent(dist.Store):
        def set(self, key, value):
            threading.Event().wait()

    worker = Start(Silent(), 2, 0.2).workers[1]
    worker.timeout = timedelta(seconds=0.2)
    assert worker._lost() == [0]


@pytest.mark.parametrize(
    "local_rank, local_count, shared, device", [(1, 2, False, 1), (0, 3, True, 0), (2, 3, True, 0)]
)
def test_workers_share_gpus_where_a_machine_has_fewer(
    monkeypatch, local_rank, local_count, shared, device
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    place = {"RANK": local_rank, "WORLD_SIZE": local_count, "LOCAL_RANK": local_rank}
    for name, value in {**place, "LOCAL_WORLD_SIZE": local_count}.items():
        monkeypatch.setenv(name, str(value))
    workers = Workers()
    assert (workers.shared, workers.device.index) == (shared, device)
    if shared:
        with pytest.raises(RunError, match=r"transport=device needs a GPU for each rank"):
            workers.group("device")
    assert workers.group("host") is None  # the default group, or none yet


def test_a_delay_is_refused_where_nccl_would_wait_on_the_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    workers = Workers()
    assert workers.group("device", sync_delay=2) is None  # a worker alone waits for nobody
    workers._from_host = from_host = object()  # as where each rank has a GPU, and NCCL is used
    with pytest.raises(RunError, match=r"delay=2 is not allowed with NCCL, .* transport=host, or"):
        workers.group("device", sync_delay=2)
    assert workers.group("device") is None and workers.group("host", sync_delay=2) is from_host


def unlike(address: str | None, network: str) -> Place:
    return Place("debian", address, network)


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ([unlike("10.0.0.1", "a"), unlike("10.0.0.2", "b")], None),
        ([unlike("10.0.0.1", "a"), unlike("127.0.1.1", "b")], 1),
        ([unlike("127.0.0.1", "a"), unlike("127.0.1.1", "b")], 0),
        ([unlike("10.0.0.1", "a"), unlike("::1", "b")], 1),
        ([unlike("127.0.1.1", "a"), unlike("127.0.1.1", "a")], None),
        ([unlike("10.0.0.1", "a"), unlike(None, "b")], None),  # an interface is named
    ],
)
def test_a_machine_that_others_do_not_reach_is_named_before_gloo_tries(places, named, monkeypatch):
    start = Start(dist.HashStore(), 2)
    here = {id(worker): place for worker, place in zip(start.workers, places, strict=True)}

    def require(worker):
        try:
            worker._require_reach(here[id(worker)])
        except FinalError as error:
            return str(error)

    for found in start.results(require, range(2)):
        assert (found is None) == (named is None)
        if named is not None:
            assert (
                f"rank {named} is on a machine whose name, debian, is {places[named].address}"
                in found
            )
            assert "set GLOO_SOCKET_IFNAME on every node" in found


@pytest.mark.parametrize(("lost", "who"), [([1], "rank 1"), ([], "other ranks")])
def test_ranks_that_do_not_connect_are_told_of_the_interface(lost, who, monkeypatch):
    (worker,) = Start(dist.HashStore(), 1).workers
    monkeypatch.setattr(worker, "_lost", lambda: lost)
    error = RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc] timed out")
    assert worker._meaning(error).startswith(f"no connection to {who}: see that process or its")
    assert "set GLOO_SOCKET_IFNAME" in worker._meaning(error)


@pytest.mark.parametrize(
    ("devices", "alone"),
    [
        ({b"cpu"}, False),
        ({b"cuda"}, False),
        ({b"shared"}, True),
        ({b"cuda", b"shared"}, True),
        ({b"cpu", b"cuda"}, True),  # which would wait for each other in vain
    ],
)
def test_where_some_have_no_gpu_of_their_own_messages_go_by_the_host(devices, alone):
    assert by_host_alone(devices) == alone
