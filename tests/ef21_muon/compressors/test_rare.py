"""Compressors for norms that are not Euclidean. TopColumns and TopSingular are also among those of
test_compressors.py. Draws are seeded; statistical bounds allow 6 standard deviations of a mean (a
false alarm in 10^9, should the generator of torch change)."""

from itertools import product

import numpy as np
import pytest
import torch
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import ALWAYS_THE_SAME, batches, lost, seeded

from ef21_muon import EF21Muon
from ef21_muon.compressors import (
    Bernoulli,
    Identity,
    Quantize,
    RandK,
    RankK,
    Scaled,
    TopColumns,
    TopK,
    TopSingular,
)
from ef21_muon.compressors.indices import index_bytes
from ef21_muon.norms import Euclidean

SCALED = {
    "quantize int2": Scaled(Quantize("int2")),
    "quantize int4 by 0.3": Scaled(Quantize("int4"), 0.3),
    "top int2": Scaled(TopK(0.3, "int2")),
    "random int2": Scaled(RandK(0.3, "int2")),
    "rank int3": Scaled(RankK(0.3, "int3")),
    "singular int3": Scaled(TopSingular(0.3, "int3")),
    "columns int2": Scaled(TopColumns(0.3, "int2")),
    "identity": Scaled(Identity(), 0.25),
    "quantize sign": Scaled(Quantize("sign"), 0.5),
    "top nearest": Scaled(TopK(0.3, {"format": "int4", "rounding": "nearest"}), 0.5),
}
DROPPED = {
    "identity": Bernoulli(Identity(), 0.3),
    "natural": Bernoulli(Quantize("natural"), 0.7),
    "rank": Bernoulli(RankK(0.3, "natural"), 0.5),
    "scaled": Bernoulli(Scaled(Quantize("int2")), 0.5),
    "top": Bernoulli(TopK(0.3, "int4"), 0.2),
    "certain": Bernoulli(TopColumns(0.3), 1),
}
MODIFIED = {f"scaled {name}": c for name, c in SCALED.items()}
MODIFIED |= {f"dropped {name}": c for name, c in DROPPED.items()}

every_modified = pytest.mark.parametrize("compressor", MODIFIED.values(), ids=MODIFIED)


def roundtrip(compressor, x, seed=0):
    return compressor.decode(compressor.encode(x, seeded(seed)), *x.shape[1:])


def singular_values(x):
    return np.linalg.svd(x.double().numpy(), compute_uv=False)


def schatten(values, p):
    return np.linalg.norm(values, p, axis=-1)


def mixed(x, q):
    """||x||_{2,q} of every matrix: the q-norm of the 2-norms of its columns."""
    return np.linalg.norm(np.linalg.norm(x.double().numpy(), axis=-2), q, axis=-1)


def spiked(x, seed):
    """Matrices whose singular values, and whose column norms, are far from equal."""
    return x * torch.rand(x.shape[2], generator=seeded(seed)).pow(4)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (1, 7), (7, 1)])
@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_singular_triplets_are_those_of_numpy(shape, fraction):
    x = spiked(torch.randn(3, *shape, generator=seeded()), 1)
    left, values, right = np.linalg.svd(x.double().numpy(), full_matrices=False)
    k = max(1, round(fraction * min(shape)))
    expected = (left[..., :k] * values[:, None, :k]) @ right[:, :k]
    decoded = roundtrip(TopSingular(fraction), x).double().numpy()
    assert np.abs(decoded - expected).max() < 1e-5 * values.max()


@settings(ALWAYS_THE_SAME, max_examples=20)
@given(x=batches(), fraction=st.sampled_from([0.05, 0.3, 0.7]))
def test_singular_contracts_in_schatten_norms(x, fraction):
    r = min(x.shape[1:])
    compressor = TopSingular(fraction)
    of_x, of_error = singular_values(x), singular_values(roundtrip(compressor, x) - x)
    for p in (1, 2, 4, np.inf):
        alpha = 1 - (1 - compressor.kept(r) / r) ** (2 / p)
        if p == 2:
            assert alpha == pytest.approx(compressor.alpha(*x.shape[1:]))
        before, error = schatten(of_x, p), schatten(of_error, p)
        most = (1 - alpha) * before**2 * (1 + 1e-5) + (1e-5 * before) ** 2
        assert (error**2 <= most).all(), p


@pytest.mark.parametrize("p", [1, 2, 4, np.inf])
def test_equal_singular_values_reach_the_schatten_rate(p):
    """So that no alpha is promised in the spectral norm, which p = infinity is."""
    x = torch.linalg.qr(torch.randn(1, 16, 10, generator=seeded())).Q
    error = schatten(singular_values(roundtrip(TopSingular(0.3), x) - x), p)
    assert error**2 == pytest.approx((1 - 0.3) ** (2 / p) * schatten(np.ones(10), p) ** 2, rel=1e-5)


@settings(ALWAYS_THE_SAME, max_examples=12)
@given(x=batches(), seed=st.integers(0, 99))
def test_no_sketch_of_its_rank_loses_less(x, seed):
    sketched, exact = (roundtrip(c, x, seed) for c in (RankK(0.3), TopSingular(0.3)))
    assert (lost(exact, x) <= lost(sketched, x) + 1e-6).all()


def test_singular_sends_what_rank_sends():
    for m, n in [(13, 17), (17, 13), (768, 3072)]:
        sent = TopSingular(0.15, "natural").payload_bytes(m, n)
        assert sent == RankK(0.15, "natural").payload_bytes(m, n)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_one_matrix_that_is_not_finite_spoils_no_other(broken):
    """And it is not mended: its layer is named by `EF21Muon.check_finite`."""
    x = torch.randn(2, 6, 9, generator=seeded())
    alone = roundtrip(TopSingular(0.4), x[1:])
    x[0, 2, 3] = broken
    decoded = roundtrip(TopSingular(0.4), x)
    assert not decoded[0].isfinite().all()
    assert torch.allclose(decoded[1:], alone, atol=1e-6)


@settings(ALWAYS_THE_SAME, max_examples=20)
@given(x=batches(), fraction=st.sampled_from([0.05, 0.3, 0.7, 1.0]))
def test_the_largest_columns_are_kept_exactly(x, fraction):
    norms = np.linalg.norm(x.double().numpy(), axis=1)
    k = max(1, round(fraction * x.shape[2]))
    decoded = roundtrip(TopColumns(fraction), x)
    for one, original, norm in zip(decoded, x, norms, strict=True):
        kept = (one == original).all(0).numpy()
        assert not one.numpy()[:, ~kept].any()
        chosen = kept & (norm > 0)
        assert chosen.sum() <= k
        left_out = norm[~chosen]
        if len(left_out) and left_out.max() > 0:
            assert chosen.sum() == k
            assert left_out.max() <= norm[chosen].min() * (1 + 1e-5)


@settings(ALWAYS_THE_SAME, max_examples=20)
@given(x=batches(), fraction=st.sampled_from([0.05, 0.3, 0.7]))
def test_columns_contract_in_mixed_norms(x, fraction):
    n = x.shape[2]
    compressor = TopColumns(fraction)
    off = roundtrip(compressor, x) - x
    for q in (1, 2, 4, np.inf):
        rate = ((n - compressor.kept(n)) / n) ** (2 / q)
        if q == 2:
            assert rate == pytest.approx(1 - compressor.alpha(*x.shape[1:]))
        error, before = mixed(off, q), mixed(x, q)
        assert (error**2 <= rate * before**2 * (1 + 1e-5)).all(), q


@pytest.mark.parametrize("q", [1, 2, 4, np.inf])
def test_columns_of_equal_norm_reach_the_mixed_rate(q):
    x = torch.ones(1, 3, 10)
    error = mixed(roundtrip(TopColumns(0.3), x) - x, q)
    assert error**2 == pytest.approx(0.7 ** (2 / q) * mixed(x, q) ** 2)


def test_column_payloads_are_indices_and_columns():
    assert TopColumns(0.25).payload_bytes(64, 40) == index_bytes(40, 10) + 4 * 640
    assert TopColumns(0.25, "int4").payload_bytes(64, 40) == index_bytes(40, 10) + 10 * 4 + 320
    x = torch.randn(2, 64, 40, generator=seeded())
    assert TopColumns(0.25, "int4").encode(x).shape[1] == index_bytes(40, 10) + 360


@every_modified
@settings(ALWAYS_THE_SAME, max_examples=6)
@given(x=batches(), seed=st.integers(0, 99))
def test_modified_messages_have_their_size_and_come_back_in_shape(compressor, x, seed):
    layers, m, n = x.shape
    before = x.clone()
    payload = compressor.encode(x, seeded(seed))
    decoded = compressor.decode(payload, m, n)
    assert torch.equal(x, before)
    assert payload.dtype == torch.uint8
    assert payload.shape == (layers, compressor.payload_bytes(m, n))
    assert decoded.dtype == torch.float32
    assert decoded.shape == x.shape
    assert not decoded[(x == 0).all((1, 2))].any(), "zeros stay zero"
    assert torch.equal(compressor.encode(x, seeded(seed)), payload)
    assert torch.equal(compressor.decode(payload, m, n), decoded)


@every_modified
@pytest.mark.parametrize(
    ("kind", "shape"), [("random", (20, 12)), ("spiked", (20, 12)), ("single entry", (3, 50))]
)
def test_modified_compressors_contract_in_expectation(compressor, kind, shape):
    """Over 512 draws of one matrix, which are one batch; 1e-6 is the rounding of factors."""
    x = torch.randn(1, *shape, generator=seeded())
    if kind == "spiked":
        x = spiked(x, 1)
    if kind == "single entry":
        x = torch.zeros(1, *shape).index_fill_(2, torch.tensor(1), 1.5)
    draws = x.expand(512, *shape)
    losses = lost(roundtrip(compressor, draws), draws)
    alpha = compressor.alpha(*shape)
    assert alpha <= 1
    assert losses.mean() <= 1 - alpha + 6 * losses.std() / 512**0.5 + 1e-6


def test_a_modified_payload_of_another_length_is_refused():
    for name, shape, excess in product(MODIFIED, [(13, 17), (1, 9), (9, 1)], [-1, 1]):
        length = MODIFIED[name].payload_bytes(*shape) + excess
        refused = pytest.raises(ValueError, match=f"a payload of {length} bytes")
        with case(name, shape, excess), refused:
            MODIFIED[name].decode(torch.zeros(2, length, dtype=torch.uint8), *shape)


@every_modified
def test_a_modified_compressor_stays_modified_where_the_other_is_quantize(compressor):
    unfitted = compressor.compressor
    for shape in [(1, 1), (9, 1), (64, 64), (200, 300)]:
        fitted, inner = compressor.fit(*shape), unfitted.fit(*shape)
        assert compressor.compressor is unfitted, shape
        assert type(fitted) is type(compressor), shape
        assert type(fitted.compressor) is type(inner), shape
        more = 1 if isinstance(compressor, Bernoulli) else 0
        assert fitted.payload_bytes(*shape) - inner.payload_bytes(*shape) == more, shape
        assert fitted.values is compressor.values, shape
        x = torch.randn(2, *shape, generator=seeded())
        assert roundtrip(fitted, x).shape == x.shape


@pytest.mark.parametrize("name", ["int2", "int3", "natural3"])
def test_damping_makes_unbiased_formats_contract(name):
    """Their alpha is 1 - omega; scaled it is 1 / (1 + omega), the largest for any scale."""
    omega = Quantize(name).values.omega(16, 768)
    scaled = Scaled(Quantize(name))
    assert scaled.alpha(16, 768) == pytest.approx(1 / (1 + omega))
    for scale in [0.01, 0.1, 0.3, 0.6, 1.0]:
        assert Scaled(Quantize(name), scale).alpha(16, 768) <= scaled.alpha(16, 768)
    assert Scaled(Quantize(name), 1.0).alpha(16, 768) == pytest.approx(1 - omega)


def test_int2_contracts_only_when_damped():
    assert Quantize("int2").alpha(16, 768) < 0
    x = torch.randn(256, 16, 768, generator=seeded())
    assert lost(roundtrip(Quantize("int2"), x), x).mean() > 1
    assert lost(roundtrip(Scaled(Quantize("int2")), x), x).mean() < 1


def test_damping_the_identity_is_a_multiple_in_every_norm():
    x = spiked(torch.randn(3, 8, 11, generator=seeded()), 1)
    scaled = Scaled(Identity(), 0.25)
    error = roundtrip(scaled, x) - x
    assert torch.equal(error, -0.75 * x)
    assert scaled.alpha(8, 11) == pytest.approx(1 - 0.75**2)


def test_damping_sends_the_same_message():
    x = torch.randn(3, 8, 11, generator=seeded())
    for compressor in (TopK(0.3, "int2"), RankK(0.3, "natural")):
        sent = Scaled(compressor).encode(x, seeded(1))
        assert torch.equal(sent, compressor.encode(x, seeded(1)))


def test_bernoulli_sends_a_layer_or_nothing():
    x = torch.randn(4096, 3, 5, generator=seeded())
    decoded = roundtrip(Bernoulli(Identity(), 0.3), x, 1)
    sent = (decoded == x).all((1, 2))
    assert not decoded[~sent].any()
    assert abs(sent.double().mean() - 0.3) <= 6 * (0.3 * 0.7 / 4096) ** 0.5


def test_a_dropped_gradient_that_is_not_finite_is_dropped():
    x = torch.full((64, 2, 3), float("nan"))
    decoded = roundtrip(Bernoulli(Identity(), 0.5), x)
    assert ((decoded == 0) | decoded.isnan()).all()
    assert 0 < decoded.isnan().sum() < decoded.numel()


def test_bernoulli_contracts_at_its_rate_in_every_norm():
    """||C(x) - x||^2 is 0 or ||x||^2 in any norm, so its mean is (1 - probability) ||x||^2."""
    assert Bernoulli(Identity(), 0.3).alpha(3, 5) == pytest.approx(0.3)
    assert Bernoulli(TopK(0.5), 0.3).alpha(4, 4) == pytest.approx(0.15)
    x = torch.randn(1, 3, 5, generator=seeded()).expand(4096, 3, 5)
    error = roundtrip(Bernoulli(Identity(), 0.3), x, 1) - x
    for norm in (schatten(singular_values(error), np.inf), mixed(error, 1)):
        share = (norm / norm.max()) ** 2
        assert abs(share.mean() - 0.7) <= 6 * (0.3 * 0.7 / 4096) ** 0.5


@pytest.mark.parametrize(
    "compressor",
    [TopSingular(0.2), TopColumns(0.2), Scaled(Quantize("int2")), Bernoulli(RankK(0.4), 0.5)],
    ids=str,
)
def test_error_feedback_makes_up_for_them_both_ways(compressor):
    """Least squares to 1 % of the loss it starts from, with a matrix and a vector."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 9)
    inputs = torch.randn(64, 12)
    targets = torch.nn.functional.linear(inputs, torch.randn(9, 12), torch.randn(9))
    optimizer = EF21Muon(
        layer.named_parameters(), norm=Euclidean(), w2s=compressor, s2w=compressor, momentum=0.5
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 40 * 0.95**step)
    losses = []
    for _ in range(100):
        loss = (layer(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_none_of_them_is_lossless():
    kinds = [TopSingular(1.0), TopColumns(1.0), *MODIFIED.values()]
    assert not any(compressor.lossless for compressor in kinds)


def test_titles():
    assert str(TopSingular(0.15, "natural")) == "singular 15% natural"
    assert str(TopColumns(0.15)) == "top columns 15%"
    assert str(Scaled(Quantize("int2"))) == "scaled quantize int2"
    assert str(Scaled(TopK(0.1), 0.5)) == "scaled 0.5 top 10%"
    assert str(Bernoulli(RankK(0.15, "natural"), 0.9)) == "sent 90%, rank 15% natural"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Scaled(Quantize("sign")), "no default scale for sign"),
        (lambda: Scaled(Quantize("natural"), 0), "scale=0: give a number above 0, at most 1"),
        (lambda: Scaled(Quantize("natural"), 1.5), "scale=1.5"),
        (lambda: Scaled(Quantize("natural"), float("nan")), "scale=nan"),
        (lambda: Scaled(Quantize("natural"), "0.5"), "scale=0.5: give a number"),
        (lambda: Scaled("natural"), "compressor='natural': give a Compressor"),
        (lambda: Scaled(Bernoulli(Identity())), "scale the one inside it"),
        (lambda: Bernoulli(None), "compressor=None: give a Compressor"),
        (lambda: Bernoulli(Identity(), 0), "probability=0: give a number above 0, at most 1"),
        (lambda: Bernoulli(Identity(), 1.1), "probability=1.1"),
        (lambda: Bernoulli(Identity(), None), "probability=None"),
        (lambda: TopSingular(0), "TopSingular got fraction=0"),
        (lambda: TopColumns(1.5), "TopColumns got fraction=1.5"),
    ],
)
def test_impossible_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
