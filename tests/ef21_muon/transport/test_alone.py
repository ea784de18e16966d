"""What is sent, counted and compared, as one process sees it: without launching any other."""

import threading
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from one_worker import build, set_gradients

from ef21_muon.compressors import Identity, TopK
from ef21_muon.compressors.base import new_generator
from ef21_muon.layers import assign, form_batches
from ef21_muon.transport import clipping, fixed
from ef21_muon.transport.fixed import Traffic, Transport
from ef21_muon.transport.host import sender, start_from_host
from ef21_muon.transport.load import dry_round, loads


def test_random_numbers_are_of_seed_rank_and_purpose():
    def draw(*stream):
        return torch.randint(1 << 40, (), generator=new_generator(torch.device("cpu"), *stream))

    streams = [(s, r, p) for s in range(3) for r in range(3) for p in ("w2s", "s2w")]
    assert len({draw(*stream).item() for stream in streams}) == len(streams)
    assert draw(1, 2, "w2s") == draw(1, 2, "w2s")


def test_the_largest_layers_are_assigned_first():
    """Else one of two ranks would have a load of 6."""
    assert assign([1, 1, 1, 1, 4], 2) == [1, 1, 1, 1, 0]


def test_an_all_gather_counts_what_goes_to_others_and_comes_from_them(monkeypatch):
    work = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(fixed, "all_gather", lambda *arguments, **options: work)
    transport = Transport()
    transport.ranks = 3
    parts, _ = transport._all_gather(torch.zeros(5, dtype=torch.uint8))
    assert (len(parts), transport.traffic) == (3, Traffic(wire_tx_bytes=10, wire_rx_bytes=10))


@pytest.mark.parametrize(
    ("server", "received"), [("sharded", 2 * 4 * 240), ("replicated", 2 * 2 * 4 * 240)]
)
def test_bytes_are_those_of_all_layers_of_a_batch(server, received):
    """Of two layers of 240 entries on three ranks; a rank's message to itself is not received."""
    group = {"params": [torch.zeros(12, 20), torch.zeros(12, 20)]}
    group |= {"w2s": Identity(), "s2w": Identity()}
    (batch,) = form_batches([group], [1, 1], server, rank=0, ranks=3)
    traffic = dry_round([batch], 0, 3)
    sent_back = 0 if server == "replicated" else 2 * 4 * 240
    found = traffic.w2s_bytes, traffic.s2w_bytes, traffic.received_bytes
    assert found == (2 * 4 * 240, sent_back, received)


def test_the_load_of_a_placement_is_what_a_rank_receives_where_that_is_more():
    """Rank 0 receives the messages of two others, and sends a fraction of that."""
    group = {"params": [torch.zeros(12, 20)], "w2s": Identity(), "s2w": TopK(0.05)}
    assert loads([group], [1], ranks=3)["rank0"].max_traffic == 2 * 4 * 240


def test_a_message_is_split_into_the_layers_of_its_batches_in_order():
    of_sizes = ((2, 2), (1, 3))  # layers, and bytes of each
    batches = [SimpleNamespace(params=n * [None], owned_by=[slice(0, n)]) for n, _ in of_sizes]
    rows = fixed._rows(torch.arange(7), batches, [size for _, size in of_sizes], 0)
    assert [one.tolist() for one in rows] == [[[0, 1], [2, 3]], [[4, 5, 6]]]


def test_fractions_of_a_byte_come_back():
    traffic = Traffic(1, 2, 3, Fraction(10, 3), 4)
    assert Traffic.from_state(traffic.state()) == traffic


def test_a_message_by_way_of_the_host_is_of_the_moment_when_it_was_started():
    """Also if the thread that sends has to finish another one first."""
    started, handed = threading.Event(), []
    message = torch.full((3,), 1.0)
    sender().submit(started.wait)
    arrive = start_from_host(lambda out, into: handed.append(out[0].tolist()) or [], [message], [])
    message.fill_(2.0)
    started.set()
    arrive()
    assert handed == [[1.0, 1.0, 1.0]]


def test_ranks_of_a_worker_clip_to_their_joint_norm(monkeypatch):
    """This rank's gradient has a norm of 3, another one's of 4."""
    monkeypatch.setattr(clipping, "place_in", lambda group: (0, 2))
    monkeypatch.setattr(clipping.dist, "all_reduce", lambda square, group: square.add_(16))
    gradient = torch.tensor([3.0, 0.0])
    clipping.clip([gradient], max_norm=1.0, group=None)
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.0]))


def test_a_lost_estimate_is_noticed():
    parameters, optimizer = build(w2s=TopK(0.3))
    for seed in range(1, 4):
        set_gradients(parameters, seed)
        optimizer.step()
    optimizer.check_agreement()
    optimizer.batches[0].up.buffer.mul_(0.9)
    with pytest.raises(ValueError, match=r"estimate of query is not the mean of the workers'"):
        optimizer.check_agreement()


def test_gradients_that_were_scaled_are_unscaled_before_they_are_sent():
    """As torch's GradScaler asks for it; an LMO alone would not notice."""
    parameters, optimizer = build()
    set_gradients(parameters, seed=1)
    expected = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad *= 8
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    for name, parameter in parameters.items():
        found = optimizer.state[parameter]["server_gradient"]
        torch.testing.assert_close(found, expected[name].view_as(found))
