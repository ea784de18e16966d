"""Dion on 1, 2 and 3 workers against baseline_reference.py, and where it is known exactly."""

import baseline_reference
import numpy as np
import pytest
import reference
import torch
from workers import baseline_steps
from workers.baseline_steps import LR, LR_DECAY, OPTIONS, SHAPES, STEPS, WEIGHT_DECAY

from baselines import Dion

WORKERS = (1, 2, 3)
ROUNDINGS = {"float32": lambda x: x, "bfloat16": reference.bfloat16}
LION = ("bias", "embedding")
WHOLE = {"float32": ["small"], "bfloat16": [], "int8": []}  # factors would be no smaller
# Of ||X - X^0|| and of ||M||. In float32 the rounding of X alone gives 1e-6. With bfloat16, noise
# of 1e-7 in P or R rounds one value in 10^4 to its other neighbour, 2^-8 away, which moves X by
# about 3e-5; without rounding at all X is more than 2e-4 away.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1e-4}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return baseline_steps.collect_from_all("dion", tmp_path_factory.mktemp("dion"))


def run_reference(recorded, values, workers, rounding):
    """X after every step and every worker's momentum at the end."""
    options = OPTIONS["dion"]
    prefix = f"{values} right_factor "
    algorithm = baseline_reference.Dion(
        {name: baseline_steps.start(name) for name in SHAPES},
        {key.removeprefix(prefix): q for key, q in recorded.items() if key.startswith(prefix)},
        WHOLE[values],
        LION,
        workers,
        options["mu"],
        options["lion_betas"],
        rounding,
    )
    models = []
    for step in range(STEPS):
        gradients = [
            {name: baseline_steps.gradient(name, step, worker) for name in SHAPES}
            for worker in range(workers)
        ]
        decay = LR_DECAY**step
        # A vector among the hidden matrices has their lr and weight decay.
        algorithm.model["bias"] *= 1 - LR * decay * WEIGHT_DECAY
        own_lr = {"bias": LR * decay, "embedding": options["lion_lr"] * decay}
        algorithm.step(gradients, LR * decay, WEIGHT_DECAY, own_lr)
        models.append(flat(algorithm.model))
    return np.stack(models), [flat(momentum) for momentum in algorithm.momentum]


def flat(model):
    return np.concatenate([layer.ravel() for layer in model.values()])


def distance(x, expected, start=0.0):
    return np.linalg.norm(x - expected) / np.linalg.norm(expected - start)


START = flat({name: baseline_steps.start(name) for name in SHAPES})


@pytest.mark.parametrize("values", ROUNDINGS)
@pytest.mark.parametrize("workers", WORKERS)
def test_steps_agree_with_the_reference(recordings, workers, values):
    of_ranks = recordings[workers]
    models, momenta = run_reference(of_ranks[0], values, workers, ROUNDINGS[values])
    for step in range(STEPS):
        model = of_ranks[0][f"{values} model"][step]
        assert distance(model, models[step], START) < TOLERANCE[values], step
    for rank, momentum in enumerate(momenta):
        recorded = of_ranks[rank][f"{values} momentum"][-1]
        assert distance(recorded, momentum) < TOLERANCE[values]


@pytest.mark.parametrize("workers", WORKERS)
def test_rounding_is_noticed(recordings, workers):
    """What the tolerance of bfloat16 is measured by."""
    models, _ = run_reference(recordings[workers][0], "bfloat16", workers, ROUNDINGS["float32"])
    model = recordings[workers][0]["bfloat16 model"][-1]
    assert distance(model, models[-1], START) > 2 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize("values", baseline_steps.VALUES)
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_all_workers_hold_the_same_model(recordings, workers, values):
    first, *others = (of_rank[f"{values} model"] for of_rank in recordings[workers])
    assert np.isfinite(first).all()
    for other in others:
        np.testing.assert_array_equal(first, other)


def factors(name):
    """Values in P and R."""
    m, n = baseline_steps.matrix_shape(name)
    return int(np.ceil(OPTIONS["dion"]["rank_fraction"] * min(m, n))) * (m + n)


def test_parameters_that_differ_between_ranks_are_refused(recordings):
    for of_rank in recordings[3]:
        assert "key differs between rank 0 and rank 2" in str(of_rank["error"])


@pytest.mark.parametrize("values", baseline_steps.VALUES)
@pytest.mark.parametrize("workers", WORKERS)
def test_logged_bytes_are_sent_bytes(recordings, workers, values):
    """By hand, and by a spy on the collectives. int8 has a float32 scale a row of P^T and R^T."""
    dense = [*LION, *WHOLE[values]]
    reduced = 4 * sum(int(np.prod(SHAPES[name])) for name in dense)
    sizes = {name: factors(name) for name in SHAPES if name not in dense}
    rows = sum(2 * size // sum(baseline_steps.matrix_shape(name)) for name, size in sizes.items())
    of_factors = {
        "float32": 4 * sum(sizes.values()),
        "bfloat16": 2 * sum(sizes.values()),
        "int8": sum(sizes.values()) + 4 * rows,
    }[values]
    reduced += of_factors if values == "float32" else 0
    gathered = 0 if values == "float32" else of_factors
    for of_rank in recordings[workers]:
        w2s, s2w, wire = of_rank[f"{values} bytes"].T
        steps = np.arange(1, STEPS + 1)
        np.testing.assert_array_equal(w2s, steps * (reduced + gathered))
        np.testing.assert_array_equal(s2w, steps * (reduced + (workers - 1) * gathered))
        ring = steps * 2 * (workers - 1) * reduced // workers
        np.testing.assert_array_equal(wire, ring + steps * (workers - 1) * gathered)
        if workers > 1:
            spied = of_rank[f"{values} spied"]
            np.testing.assert_array_equal(spied, np.outer(steps, [reduced, gathered]))


def polar(matrix):
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def alone(shape, **options):
    """A hidden matrix and its optimizer."""
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    return parameter, Dion([parameter], weight_decay=0.0, **options), generator


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9), (7, 1)])
def test_at_full_rank_on_the_singular_vectors_it_orthonormalises_momentum(shape):
    """Where gradients share their singular vectors and Q starts there, P = U, R = V S and Q = V.

    The momentum is then a geometric sum, M <- mu (M + G), and every step its polar factor. Singular
    values decrease: in another order power iterations would leave the vectors, if perturbed.
    """
    mu, lr = 0.9, 0.1
    parameter, optimizer, generator = alone(shape, lr=lr, mu=mu, rank_fraction=1.0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    optimizer.state[parameter]["right_factor"].copy_(v.T)
    expected, momentum = parameter.detach().clone(), torch.zeros(shape)
    for _ in range(10):
        scales = torch.rand(min(shape), generator=generator).sort(descending=True).values + 0.1
        parameter.grad = u @ torch.diag(scales) @ v
        optimizer.step()
        buffer = momentum + parameter.grad
        expected -= lr * (shape[0] / shape[1]) ** 0.5 * polar(buffer)
        momentum = mu * buffer
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(optimizer.state[parameter]["momentum"], momentum)


def test_power_iterations_find_the_leading_singular_vectors():
    """Of a constant gradient, from any start: the step is sum u_i v_i^T over the r largest."""
    lr, rank = 0.1, 3
    parameter, optimizer, generator = alone((10, 8), lr=lr, mu=0.0, rank_fraction=rank / 8)
    u, _, v = torch.linalg.svd(torch.randn(10, 8, generator=generator), full_matrices=False)
    scales = torch.tensor([8.0, 4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    for _ in range(40):
        parameter.grad = u @ torch.diag(scales) @ v
        before = parameter.detach().clone()
        optimizer.step()
    step = (before - parameter.detach()) / (lr * (10 / 8) ** 0.5)
    torch.testing.assert_close(step, u[:, :rank] @ v[:rank], rtol=0, atol=1e-5)


def test_what_the_factors_miss_is_sent_later():
    """Of one gradient and none after it, mu = 0: the momentum ends at zero, all was sent."""
    parameter, optimizer, generator = alone((10, 8), mu=0.0, rank_fraction=0.25)
    parameter.grad = torch.randn(10, 8, generator=generator)
    size = parameter.grad.norm()
    norms = []
    for _ in range(60):
        optimizer.step()
        norms.append(optimizer.state[parameter]["momentum"].norm().item())
        parameter.grad.zero_()
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 0.5 * size
    assert norms[-1] < 1e-5 * size


def test_without_a_gradient_nothing_moves():
    parameter, optimizer, _ = alone((10, 8))
    before, factor = parameter.detach().clone(), optimizer.state[parameter]["right_factor"].clone()
    parameter.grad = torch.zeros(10, 8)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert torch.equal(optimizer.state[parameter]["right_factor"], factor)


@pytest.mark.parametrize(
    ("fraction", "shape", "rank"),
    [
        (0.15, (128, 512), 20),
        (0.25, (128, 128), 32),
        (0.07, (100, 300), 7),
        (1.0, (5, 9), 5),
        (1e-12, (5, 9), 1),
    ],
)
def test_the_rank_is_rounded_up(fraction, shape, rank):
    parameter, optimizer, _ = alone(shape, rank_fraction=fraction)
    assert optimizer.state[parameter]["right_factor"].shape == (shape[1], rank)


def test_who_is_lions_and_at_what_lr():
    def groups(**of_embedding):
        hidden = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))]
        embedding = [torch.nn.Parameter(torch.ones(10, 16))]
        vectors = [torch.nn.Parameter(torch.ones(4))]
        return [
            {"name": "hidden", "params": hidden},
            {"name": "embedding", "params": embedding, **of_embedding},
            {"name": "scales", "params": vectors},
        ]

    optimizer = Dion(groups(), lr=0.4, weight_decay=0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1, 0.4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.0]
    assert [tuple(batch.params[0].shape) for batch in optimizer.lion] == [(4,), (10, 16), (4,)]
    optimizer = Dion(groups(lr=0.7), lr=0.4, lion_lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.7, 0.2]
    optimizer = Dion(groups(algorithm="dion"), lr=0.4, lion_lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.4, 0.2]
    assert len(optimizer.lion) == 2
    optimizer = Dion(groups(), lion_betas=[0.5, 0.6])
    assert {group["lion_betas"] for group in optimizer.param_groups} == {(0.5, 0.6)}


def test_titles():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    assert Dion([parameter], rank_fraction=0.15).title == "Dion rank 15%"
    assert Dion([parameter], values="natural4").title == "Dion rank 25% natural4"
