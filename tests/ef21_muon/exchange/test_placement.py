"""Who serves what: the spread of layers, their owners, and the cut into buckets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ef21_muon import EF21Muon, Identity, Spectral, TopK, param_groups
from ef21_muon.exchange.collectives import Exchange
from ef21_muon.exchange.layers import LayerBatch, lmo_costs, serve, traffic_by_placement
from ef21_muon.exchange.placement import PLACEMENTS, busiest, cut, owned_layers, spread
from model import GPT
from training.config import build, compose


def loads(costs, ranks):
    of_rank = [0] * ranks
    for cost, rank in zip(costs, spread(costs, ranks), strict=True):
        of_rank[rank] += cost
    return of_rank


@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=40), ranks=st.integers(1, 9))
def test_no_rank_has_more_than_a_mean_and_a_layer(costs, ranks):
    """Graham's bound for list scheduling."""
    assert max(loads(costs, ranks)) <= sum(costs) / ranks + max(costs)


@pytest.mark.parametrize(("ranks", "largest"), [(2, 1.01), (4, 1.01), (8, 1.10)])
def test_the_load_of_124m_is_balanced(ranks, largest):
    """Largest over mean LMO cost."""
    with torch.device("meta"):
        model = GPT(build(compose(("model=gpt2-124m",)).config.model, "model"))
    costs = [
        group["norm"].cost(*p.shape) for group in param_groups(model) for _, p in group["params"]
    ]
    of_rank = loads(costs, ranks)
    assert max(of_rank) * ranks / sum(of_rank) <= largest


@given(
    spread_over=st.lists(st.integers(0, 3), max_size=12).map(sorted),
    server=st.sampled_from(PLACEMENTS),
)
def test_every_layer_has_its_owners(spread_over, server):
    owners = [[] for _ in spread_over]
    for rank, part in enumerate(owned_layers(spread_over, server, 4)):
        for layer in range(len(spread_over))[part]:
            owners[layer].append(rank)
    expected = {
        "rank0": [[0]] * len(spread_over),
        "sharded": [[rank] for rank in spread_over],
        "replicated": [[0, 1, 2, 3]] * len(spread_over),
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
    """Of three ranks, by hand: 3 layers of 10 bytes and 4 back, spread over ranks 0, 0, 1; and

    4 layers of 20 bytes and none back, spread over 0, 1, 2, 2. To the servers goes all that is not
    to oneself; back go two copies of what is one's own.
    """
    owned = [owned_layers(one, server, 3) for one in ([0, 0, 1], [0, 1, 2, 2])]
    exchange = Exchange(owned, [10, 20], [4, 0])
    exchange.ranks = 3
    expected = [up + down for up, down in zip(to_servers, back, strict=True)]
    assert [exchange.wire_tx_bytes(rank) for rank in range(3)] == expected
    assert exchange.w2s_bytes == 110


def test_one_process_sends_nothing():
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    exchange = EF21Muon([parameter], w2s=Identity()).exchange
    assert exchange.wire_tx_bytes(0) == 0
    assert exchange.w2s_bytes == exchange.s2w_bytes == 4 * 4 * 6


@given(
    sizes=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=8),
    ranks=st.integers(2, 5),
)
def test_the_busiest_rank_is_that_of_the_exchange(sizes, ranks):
    """What it sends, by Exchange; what it receives, by who sends it what."""
    w2s, s2w = (list(column) for column in zip(*sizes, strict=True))
    spread_over = sorted(spread([1] * len(sizes), ranks))
    for server, most in busiest(w2s, s2w, spread_over, ranks).items():
        exchange = Exchange(
            [owned_layers([owner], server, ranks) for owner in spread_over], w2s, s2w
        )
        exchange.ranks = ranks
        back = [0 if server == "replicated" else size for size in s2w]
        owners = [
            [rank for rank, part in enumerate(owned) if part.stop > part.start]
            for owned in exchange.owned
        ]
        received = [0] * ranks
        for layer, owning in enumerate(owners):
            for rank in range(ranks):
                received[rank] += (ranks - 1) * w2s[layer] * (rank in owning)
                received[rank] += back[layer] * (rank not in owning)
        sent = [exchange.wire_tx_bytes(rank) for rank in range(ranks)]
        assert most == max(*sent, *received)


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
    layers = [torch.nn.Parameter(torch.zeros(32, 32)) for _ in range(4)]
    groups = [{"params": layers, "norm": Spectral(), "w2s": w2s, "s2w": s2w}]
    traffic = traffic_by_placement(groups, lmo_costs(groups), ranks)
    assert next(iter(traffic)) == expected
    assert sorted(traffic.values()) == list(traffic.values())
    assert ("replicated" in traffic) == s2w.lossless
    chosen = serve(LayerBatch, groups, lmo_costs(groups), "auto", 0, ranks)
    named = serve(LayerBatch, groups, lmo_costs(groups), expected, 0, ranks)
    assert [batch.owned_by for batch in chosen] == [batch.owned_by for batch in named]
