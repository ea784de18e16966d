"""DeMo on 1, 2 and 3 workers against baseline_reference.py; its transform and messages."""

from math import comb, log2

import baseline_reference
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from workers import baseline_steps
from workers.baseline_steps import HIDDEN, LR, LR_DECAY, OPTIONS, SHAPES, STEPS, WEIGHT_DECAY

from baselines import DeMo
from baselines.demo import Chunks, dct_basis
from ef21_muon.compressors.base import value_format
from ef21_muon.compressors.sparse import largest_divisor

WORKERS = (1, 2, 3)
SIDES = st.integers(1, 40)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return baseline_steps.collect_from_all("demo", tmp_path_factory.mktemp("demo"))


def run_reference(workers, rounding):
    """X after every step, every worker's momentum at the end, which entries of X are settled, and

    the gap of the choice of coefficients.
    """
    parts = [(tuple(HIDDEN), WEIGHT_DECAY), (("embedding",), 0.0)]
    algorithms = []
    for names, _ in parts:
        start = {name: baseline_steps.start(name) for name in names}
        options = OPTIONS["demo"] | {"rounding": rounding}
        algorithms.append(baseline_reference.DeMo(start, workers, **options))
    models = []
    for step in range(STEPS):
        gradients = [
            {name: baseline_steps.gradient(name, step, worker) for name in SHAPES}
            for worker in range(workers)
        ]
        for algorithm, (_, weight_decay) in zip(algorithms, parts, strict=True):
            algorithm.step(gradients, LR * LR_DECAY**step, weight_decay)
        models.append(flat(algorithm.model for algorithm in algorithms))
    momenta = [
        flat(algorithm.momentum[worker] for algorithm in algorithms) for worker in range(workers)
    ]
    settled = flat(algorithm.settled for algorithm in algorithms)
    return np.stack(models), momenta, settled, min(algorithm.gap for algorithm in algorithms)


def flat(models):
    return np.concatenate([layer.ravel() for model in models for layer in model.values()])


@pytest.mark.parametrize("workers", WORKERS)
def test_steps_agree_with_the_reference(recordings, workers):
    """Choices of coefficients are clearer than the rounding of float32, about 1e-6."""
    models, momenta, settled, gap = run_reference(workers, lambda x: x)
    assert gap > 1e-5
    assert settled.mean() > 0.98
    recorded = recordings[workers][0]["float32 model"]
    np.testing.assert_allclose(recorded[:, settled], models[:, settled], rtol=0, atol=2e-6)
    for of_rank, momentum in zip(recordings[workers], momenta, strict=True):
        recorded = of_rank["float32 momentum"][-1]
        np.testing.assert_allclose(recorded, momentum, rtol=0, atol=1e-5)


@pytest.mark.parametrize("workers", WORKERS)
def test_rounded_values_agree_with_the_reference(recordings, workers):
    """Up to signs that change where float32 rounds a value to the other neighbour, 2^-8 away."""

    def differing(rounding):
        models, _, settled, _ = run_reference(workers, rounding)
        recorded = recordings[workers][0]["bfloat16 model"]
        return (np.abs(recorded - models)[-1, settled] > LR / 10).mean()

    assert differing(reference.bfloat16) < 0.005
    assert differing(lambda x: x) > 0.02


@pytest.mark.parametrize("values", baseline_steps.VALUES)
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_all_workers_hold_the_same_model(recordings, workers, values):
    first, *others = (of_rank[f"{values} model"] for of_rank in recordings[workers])
    assert np.isfinite(first).all()
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_parameters_that_differ_between_ranks_are_refused(recordings):
    for of_rank in recordings[3]:
        assert "key differs between rank 0 and rank 2" in str(of_rank["error"])


@pytest.mark.parametrize("values", baseline_steps.VALUES)
@pytest.mark.parametrize("workers", WORKERS)
def test_logged_bytes_are_sent_bytes(recordings, workers, values):
    """A spy on the collectives sees one all-gather a step of every layer's payload."""
    options = OPTIONS["demo"]
    size = sum(
        Chunks(
            *baseline_steps.matrix_shape(name),
            options["chunk"],
            options["k"],
            value_format(values),
            torch.device("cpu"),
        ).payload_bytes
        for name in SHAPES
    )
    steps = np.arange(1, STEPS + 1)
    for of_rank in recordings[workers]:
        w2s, s2w, wire = of_rank[f"{values} bytes"].T
        np.testing.assert_array_equal(w2s, steps * size)
        np.testing.assert_array_equal(s2w, steps * (workers - 1) * size)
        np.testing.assert_array_equal(wire, steps * (workers - 1) * size)
        if workers > 1:
            np.testing.assert_array_equal(of_rank[f"{values} spied"], np.outer(steps, [0, size]))


def chunks_of(m, n, chunk, k, values="float32"):
    return Chunks(m, n, chunk, k, value_format(values), torch.device("cpu"))


def random_matrices(m, n):
    return torch.randn(2, m, n, generator=torch.Generator().manual_seed(m * n))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_the_basis_is_the_orthonormal_dct(size):
    expected = torch.from_numpy(baseline_reference.cosines(size))
    basis = dct_basis(size).double()
    torch.testing.assert_close(basis, expected, rtol=0, atol=1e-7)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.T, identity, rtol=0, atol=1e-6)


@given(m=SIDES, n=SIDES, chunk=st.integers(1, 20))
@settings(max_examples=15)
def test_the_transform_agrees_with_cosines_and_is_undone(m, n, chunk):
    chunks, x = chunks_of(m, n, chunk, k=1), random_matrices(m, n)
    coefficients = chunks.transform(x)
    for matrix, of_matrix in zip(x.double().numpy(), coefficients, strict=True):
        tiles = baseline_reference.tiles((m, n), chunk)
        assert len(of_matrix) == len(tiles)
        for tile, of_chunk in zip(tiles, of_matrix, strict=True):
            rows, columns = (baseline_reference.cosines(side) for side in matrix[tile].shape)
            expected = (rows @ matrix[tile] @ columns.T).ravel()
            np.testing.assert_allclose(of_chunk, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(chunks.inverse(coefficients), x, rtol=0, atol=1e-5)


@given(m=SIDES, n=SIDES, chunk=st.integers(1, 20), k=st.integers(1, 50))
@settings(max_examples=20)
def test_a_message_holds_the_k_largest_of_every_chunk(m, n, chunk, k):
    chunks = chunks_of(m, n, chunk, k)
    coefficients = random_matrices(m, n).view(2, chunks.count, chunks.size)
    message = chunks.encode(coefficients)
    assert message.shape == (2, chunks.payload_bytes)
    sent = chunks.mean(message[None])
    kept = sent != 0
    assert (kept.sum(2) == min(k, chunks.size)).all()
    assert torch.equal(sent[kept], coefficients[kept])
    least = coefficients.abs().masked_fill(~kept, torch.inf).amin(2)
    assert (coefficients.abs().masked_fill(kept, 0).amax(2) <= least).all()


@given(m=SIDES, n=SIDES, chunk=st.integers(1, 20), k=st.integers(1, 50))
@settings(max_examples=40)
def test_indices_take_few_bytes(m, n, chunk, k):
    """At least what distinguishes the k places in every chunk, at most indices of fixed width."""
    chunks = chunks_of(m, n, chunk, k)
    distinct = log2(comb(chunks.size, chunks.k))
    assert 8 * chunks.index_bytes >= chunks.count * distinct
    width = (chunks.size - 1).bit_length()
    assert chunks.index_bytes <= -(-chunks.count * chunks.k * width // 8)


def test_what_the_published_setting_takes():
    """32 of 64 x 64: Elias-Fano takes 9 bits an index; log2 C(4096, 32) / 32 is 8.3."""
    chunks = chunks_of(768, 3072, 64, 32)
    coefficients = 768 * 3072 // 64**2 * 32
    assert chunks.index_bytes == coefficients * 9 // 8
    assert chunks.payload_bytes == coefficients * 9 // 8 + 4 * coefficients
    assert chunks_of(768, 3072, 64, 32, "int8").payload_bytes / coefficients == 2.25
    assert chunks_of(768, 3072, 64, 1).index_bytes == 768 * 3072 // 64**2 * 12 // 8


@pytest.mark.parametrize(
    ("number", "limit", "divisor"),
    [(50304, 64, 64), (768, 64, 64), (100, 64, 50), (131, 64, 1), (61, 64, 61), (1, 64, 1)],
)
def test_the_largest_divisor(number, limit, divisor):
    assert largest_divisor(number, limit) == divisor


def test_means_are_over_those_that_sent():
    """Two workers keep 1 of 2 coefficients: one that both sent is their mean, others stay whole."""
    chunks = chunks_of(1, 6, chunk=2, k=1)
    first = torch.tensor([[[4.0, 1.0], [1.0, 3.0], [6.0, 0.0]]])
    second = torch.tensor([[[2.0, 1.0], [5.0, 3.0], [0.0, 8.0]]])
    of_workers = torch.stack([chunks.encode(first), chunks.encode(second)])
    expected = torch.tensor([[[3.0, 0.0], [5.0, 3.0], [6.0, 8.0]]])
    assert torch.equal(chunks.mean(of_workers), expected)


def test_with_all_coefficients_and_no_momentum_it_is_sign_descent():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 12), (30,), (4, 5, 6)]
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    optimizer = DeMo(parameters, lr=0.1, decay=0.0, k=64 * 64)
    expected = [parameter.detach().clone() for parameter in parameters]
    for _ in range(5):
        for parameter, x in zip(parameters, expected, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad += 0.01 * parameter.grad.sign()  # clearer than rounding errors
            x -= 0.1 * parameter.grad.sign()
        optimizer.step()
        for parameter, x in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach(), x)


@pytest.mark.parametrize("values", ["float32", "natural4", "sign"])
def test_what_is_sent_leaves_the_momentum(values):
    """M' + IDCT(q) = decay M + G, also where q was rounded."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer = DeMo([parameter], lr=0.1, decay=0.9, k=4, chunk=8, values=values)
    momentum = optimizer.state[parameter]["momentum"]
    gather, sent = optimizer.transport.gather, []
    optimizer.transport.gather = lambda messages: sent.append(messages[0]) or gather(messages)
    for _ in range(5):
        before = momentum.clone()
        parameter.grad = torch.randn(16, 24, generator=generator)
        optimizer.step()
        q = optimizer.chunks[0].inverse(optimizer.chunks[0].mean(sent[-1][None]))[0]
        torch.testing.assert_close(momentum + q, 0.9 * before + parameter.grad)
        assert 0 < q.norm() < 2 * parameter.grad.norm()


def test_titles():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    assert DeMo([parameter]).title == "DeMo top 32 of 64x64"
    assert DeMo([parameter], k=8, values="int8").title == "DeMo top 8 of 64x64 int8"
