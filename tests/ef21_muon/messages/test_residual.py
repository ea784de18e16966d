"""Two compressors in one message."""

import pytest
import torch
from compression import batches, seeded
from hypothesis import given
from hypothesis import strategies as st

from ef21_muon import Dense, Identity, Natural, RankK, Residual, TopK

NEAREST = {"format": "int4", "stochastic": False}
PAIRS = {
    "rank and sign": Residual(RankK(0.2, "natural"), Dense("sign")),
    "top and natural": Residual(TopK(0.1), Dense("natural")),
    "rank and top": Residual(RankK(0.1, NEAREST), TopK(0.2, "int4")),
    "three": Residual(RankK(0.1), Residual(TopK(0.1), Dense("sign"))),
}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@every_pair
def test_the_second_writes_what_the_first_has_left(pair):
    """Step by step, with the same random numbers."""
    x = torch.randn(3, 12, 20, generator=seeded(1))
    both, apart = seeded(2), seeded(2)
    message = pair.encode(x, both)
    first = pair.first.decode(pair.first.encode(x, apart), 12, 20)
    second = pair.second.decode(pair.second.encode(x - first, apart), 12, 20)
    assert torch.equal(pair.decode(message, 12, 20), first + second)
    assert message.shape == (3, pair.payload_bytes(12, 20))
    assert both.get_state().equal(apart.get_state())


@given(x=batches(), seed=st.integers(0, 99))
def test_errors_of_deterministic_parts_multiply(x, seed):
    """Top k without rounding keeps its promise for every matrix, so two of them do."""
    pair = Residual(TopK(0.2), TopK(0.3))
    m, n = x.shape[1:]
    left = 1 - pair.alpha(m, n)
    assert left == pytest.approx((1 - TopK(0.2).alpha(m, n)) * (1 - TopK(0.3).alpha(m, n)))
    decoded = pair.decode(pair.encode(x, seeded(seed)), m, n)
    error, whole = (t.double().flatten(1).square().sum(1) for t in (decoded - x, x))
    assert (error <= left * whole * (1 + 1e-5) + 1e-30).all()


def test_on_average_random_parts_keep_the_promise():
    x = torch.randn(1, 16, 24, generator=seeded(3)).expand(400, -1, -1)
    pair = Residual(RankK(0.25, "natural"), Dense("natural"))
    decoded = pair.decode(pair.encode(x, seeded(4)), 16, 24)
    lost = ((decoded - x).square().sum((1, 2)) / x[0].square().sum()).mean()
    assert lost <= 1 - pair.alpha(16, 24)


def test_low_rank_and_signs_lose_less_than_either_of_twice_the_size():
    x = torch.randn(2, 64, 4, generator=seeded(5)) @ torch.randn(2, 4, 96, generator=seeded(6))
    x = x + 0.3 * torch.randn(2, 64, 96, generator=seeded(7))
    pair = Residual(RankK(0.1, NEAREST), Dense("sign"))

    def loss(compressor):
        return (compressor.decode(compressor.encode(x, seeded(8)), 64, 96) - x).norm()

    larger = RankK(0.3, NEAREST), Dense("int2")
    assert all(c.payload_bytes(64, 96) > pair.payload_bytes(64, 96) for c in larger)
    assert all(loss(pair) < loss(compressor) for compressor in larger)


def test_parts_are_fitted_and_what_saves_nothing_gives_way():
    pair = Residual(RankK(0.2, "natural"), Dense("sign"))
    fitted = pair.fit(1, 40)
    assert isinstance(fitted.first, Dense) and fitted.second is pair.second
    assert fitted.payload_bytes(1, 40) < 160
    assert isinstance(Residual(Identity(), Dense("sign")).fit(8, 8), Identity)


def test_what_it_says_and_refuses():
    assert str(PAIRS["rank and sign"]) == "rank 20% natural + dense sign"
    with pytest.raises(ValueError, match=r"first=.*: give a Compressor of ef21_muon"):
        Residual(Natural(), Dense("sign"))
    with pytest.raises(ValueError, match="second=None: give a Compressor of ef21_muon"):
        Residual(Dense("sign"), None)
    pair = PAIRS["rank and sign"]
    with pytest.raises(ValueError, match=r"rank 20% natural \+ dense sign of a 12 x 20 matrix"):
        pair.decode(torch.zeros(1, 7, dtype=torch.uint8), 12, 20)
