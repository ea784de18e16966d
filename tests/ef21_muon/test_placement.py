"""Who serves what: the assignment of layers, their owner ranks, and the cut into buckets."""

from types import SimpleNamespace

import pytest
import torch
from a_round import a_round
from hypothesis import given
from hypothesis import strategies as st

from ef21_muon import EF21Muon, param_groups
from ef21_muon.compressors import Identity, TopK
from ef21_muon.layers import PLACEMENTS, assign, cut, lmo_costs, owned_layers
from ef21_muon.norms import Euclidean, Spectral
from ef21_muon.transport.load import MULTIPLICATIONS_PER_BYTE, Load, dry_round, loads
from model import GPT
from training.config import build, compose


def costs_of_ranks(costs, ranks):
    of_rank = [0] * ranks
    for cost, rank in zip(costs, assign(costs, ranks), strict=True):
        of_rank[rank] += cost
    return of_rank


@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=40), ranks=st.integers(1, 9))
def test_no_rank_has_more_than_a_mean_and_a_layer(costs, ranks):
    """Graham's bound for list scheduling."""
    assert max(costs_of_ranks(costs, ranks)) <= sum(costs) / ranks + max(costs)


@pytest.mark.parametrize(("ranks", "largest"), [(2, 1.01), (4, 1.01), (8, 1.10)])
def test_the_load_of_124m_is_balanced(ranks, largest):
    """Largest over mean LMO cost."""
    with torch.device("meta"):
        model = GPT(build(compose(("model=gpt2-124m",)).config.model, "model"))
    costs = [
        group["norm"].cost(*p.shape) for group in param_groups(model) for _, p in group["params"]
    ]
    of_rank = costs_of_ranks(costs, ranks)
    assert max(of_rank) * ranks / sum(of_rank) <= largest


@given(
    assigned=st.lists(st.integers(0, 3), max_size=12).map(sorted),
    server=st.sampled_from(PLACEMENTS),
)
def test_every_layer_has_its_owners(assigned, server):
    owners = [[] for _ in assigned]
    for rank, part in enumerate(owned_layers(assigned, server, 4)):
        for layer in range(len(assigned))[part]:
            owners[layer].append(rank)
    expected = {
        "rank0": [[0]] * len(assigned),
        "sharded": [[rank] for rank in assigned],
        "replicated": [[0, 1, 2, 3]] * len(assigned),
    }
    assert owners == expected[server]


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=30), parts=st.integers(1, 40))
def test_buckets_are_consecutive_and_not_too_many(sizes, parts):
    buckets = cut(sizes, parts)
    assert [batch for bucket in buckets for batch in bucket] == list(range(len(sizes)))
    assert all(len(bucket) for bucket in buckets)
    assert len(buckets) <= min(parts, len(sizes))
    assert max(sum(sizes[b] for b in bucket) for bucket in buckets) <= (
        sum(sizes) / parts + max(sizes)
    )


@pytest.mark.parametrize(
    ("server", "to_servers", "back"),
    [
        ("rank0", [0, 110, 110], [24, 0, 0]),
        ("sharded", [110 - 40, 110 - 30, 110 - 40], [16, 8, 0]),
        ("replicated", [220, 220, 220], [0, 0, 0]),
    ],
)
def test_what_goes_over_the_wire(server, to_servers, back):
    """Of three ranks, by hand: 3 layers of 10 bytes and 4 back, assigned to ranks 0, 0, 1; and

    4 layers of 20 bytes and none back, assigned to 0, 1, 2, 2. To the servers goes all that is not
    to oneself; back go two copies of what is one's own.
    """
    sizes = ((10, 4), [0, 0, 1]), ((20, 0), [0, 1, 2, 2])
    batches = [new_batch(*size, owned_layers(owners, server, 3)) for size, owners in sizes]
    traffic = [dry_round(batches, rank, 3) for rank in range(3)]
    expected = [up + down for up, down in zip(to_servers, back, strict=True)]
    assert [one.wire_tx_bytes for one in traffic] == expected
    assert [one.w2s_bytes for one in traffic] == [110] * 3


def new_batch(w2s, s2w, owned_by):
    """What a transport looks at, of layers with messages of these sizes."""
    layers = max(part.stop for part in owned_by)
    return SimpleNamespace(
        up=SimpleNamespace(size=w2s),
        down=SimpleNamespace(size=s2w),
        params=[None] * layers,
        owned_by=owned_by,
        replicated=all(part == slice(0, layers) for part in owned_by),
    )


def test_one_process_sends_nothing():
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    traffic = a_round(EF21Muon([parameter], w2s=Identity()))
    assert traffic.wire_tx_bytes == 0
    assert traffic.w2s_bytes == traffic.s2w_bytes == 4 * 4 * 6


@given(
    sizes=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=8),
    ranks=st.integers(2, 5),
    server=st.sampled_from(PLACEMENTS),
)
def test_what_is_sent_and_received_layer_by_layer(sizes, ranks, server):
    """A message per layer to each owner but oneself, and back to each rank but the owners."""
    assigned = sorted(assign([1] * len(sizes), ranks))
    of_layers = [owned_layers([owner], server, ranks) for owner in assigned]
    batches = [new_batch(*size, owned_by) for size, owned_by in zip(sizes, of_layers, strict=True)]
    for rank in range(ranks):
        sent = received = 0
        for (up, back), owned_by in zip(sizes, of_layers, strict=True):
            owners = [one for one in range(ranks) if owned_by[one] != slice(1, 1)]
            owners = [one for one in owners if owned_by[one].stop > owned_by[one].start]
            back = 0 if server == "replicated" else back
            sent += up * len({*owners} - {rank}) + back * (ranks - 1) * (rank in owners)
            received += up * (ranks - 1) * (rank in owners) + back * (rank not in owners)
        traffic = dry_round(batches, rank, ranks)
        assert (traffic.wire_tx_bytes, traffic.wire_rx_bytes) == (sent, received)


@pytest.mark.parametrize(
    ("w2s", "s2w", "ranks", "expected"),
    [
        (TopK(0.01), Identity(), 2, "replicated"),
        (Identity(), Identity(), 2, "sharded"),
        (Identity(), Identity(), 8, "sharded"),
        (TopK(0.01), TopK(0.01), 2, "sharded"),  # nothing could be compressed where all serve all
    ],
)
def test_auto_takes_what_moves_the_least(w2s, s2w, ranks, expected):
    """Of small layers, whose LMOs take no time."""
    layers = [torch.nn.Parameter(torch.zeros(32, 32)) for _ in range(4)]
    groups = [{"params": layers, "norm": Euclidean(), "w2s": w2s, "s2w": s2w}]
    found = loads(groups, lmo_costs(groups), ranks)
    assert next(iter(found)) == expected
    moved = [load.max_traffic for load in found.values()]
    assert sorted(moved) == moved
    assert ("replicated" in found) == s2w.lossless


def test_auto_leaves_lmos_to_one_rank_each_where_they_take_longer_than_messages():
    """All ranks of "replicated" take all LMOs: of many large layers that is longer than sending."""
    layers = [torch.nn.Parameter(torch.zeros(4096, 4096, device="meta")) for _ in range(8)]
    groups = [{"params": layers, "norm": Spectral(), "w2s": TopK(0.001), "s2w": Identity()}]
    found = loads(groups, lmo_costs(groups), 8)
    assert found["replicated"].max_traffic < found["sharded"].max_traffic
    assert found["replicated"].max_multiplications == 8 * found["sharded"].max_multiplications
    on_a_cpu = min(found, key=lambda server: found[server].weight("cpu"))
    on_a_gpu = min(found, key=lambda server: found[server].weight("cuda"))
    assert (on_a_cpu, on_a_gpu) == ("sharded", "replicated")
    per_byte = MULTIPLICATIONS_PER_BYTE["cpu"]
    assert Load(10, 5 * per_byte).weight("cpu") == 15
