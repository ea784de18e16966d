"""Messages by way of the host's memory; see tests/support/workers/host_exchange.py."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from run import torchrun
from workers.host_exchange import CASES

from ef21_muon.transport.host import require_host, sends_from_host, start_from_host

on_gpu = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all ranks, by device and path."""
    known = {}

    def of(device, path):
        if (device, path) not in known:
            directory = tmp_path_factory.mktemp(f"{device}-{path}")
            torchrun("host_exchange.py", directory, device, path, ranks=2)
            known[device, path] = [
                dict(np.load(directory / f"rank{rank}.npz")) for rank in range(2)
            ]
        return known[device, path]

    return of


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize("case", CASES)
def test_messages_arrive_as_those_that_gloo_sends_itself(results, case, device):
    """On the CPU bit for bit; a GPU rounds otherwise, and rounds random values otherwise."""
    for found, expected in zip(results(device, "host"), results("cpu", "direct"), strict=True):
        model, of_gloo = found[f"{case} model"], expected[f"{case} model"]
        if device == "cpu":
            np.testing.assert_array_equal(model, of_gloo)
        else:
            tolerance = 0.2 if case == "local" else 1e-3
            assert np.linalg.norm(model - of_gloo) < tolerance * np.linalg.norm(of_gloo)
        assert list(found[f"{case} bytes"]) == list(expected[f"{case} bytes"])


def test_what_arrives_is_taken_up_after_the_works_and_in_order():
    """Of two messages the first is handed over first, whatever is waited for first."""
    handed, buffers = [], [torch.zeros(3), torch.zeros(3)]

    def send(outgoing, incoming):
        handed.append(outgoing[0][0].item())
        incoming[0].copy_(2 * outgoing[0])
        return []

    started = [
        start_from_host(send, [torch.full((3,), number)], [buffer])
        for number, buffer in zip((1.0, 2.0), buffers, strict=True)
    ]
    for arrive in reversed(started):
        arrive()
    assert handed == [1, 2]
    assert [buffer.tolist() for buffer in buffers] == [[2, 2, 2], [4, 4, 4]]


def test_an_error_of_sending_is_raised_where_the_message_is_waited_for():
    def send(outgoing, incoming):
        raise RuntimeError("connection closed")

    arrive = start_from_host(send, [torch.zeros(1)], [torch.zeros(1)])
    with pytest.raises(RuntimeError, match="connection closed"):
        arrive()


def test_what_is_on_the_cpu_is_sent_from_there():
    assert not sends_from_host(None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "device", "refused"),
    [
        ("cpu:gloo,cuda:nccl", "cuda", True),
        ("cpu:gloo,cuda:gloo", "cuda", False),
        ("cpu:gloo,cuda:nccl", "cpu", False),
    ],
)
def test_messages_under_way_are_not_for_nccl(monkeypatch, config, device, refused):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    error = pytest.raises(
        ValueError, match=r"^sync_delay=1 is not allowed with NCCL, .*: give a process"
    )
    with error if refused else nullcontext():
        require_host(None, torch.device(device), "sync_delay=1")
