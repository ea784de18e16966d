"""GreedyLore's means by several workers, who are threads here, against baseline_reference.py."""

import copy
import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import baseline_reference
import numpy as np
import pytest
import torch

from baselines.greedylore import GreedyLore

SHAPES = {"wide": (12, 20), "tall": (30, 8), "kernel": (8, 3, 5), "small": (2, 2), "bias": (15,)}
FACTORED = {"wide": (12, 20), "tall": (8, 30), "kernel": (8, 15)}  # as m x n, m <= n
RANK, EVERY, STEPS = 3, 4, 11


def gradient(name, step, worker):
    """Of one worker: low rank that changes slowly and all have in common, and noise."""
    rows, *rest = SHAPES[name]
    common = np.random.default_rng([1, step // 6, *name.encode()])
    own = np.random.default_rng([2, step, worker, *name.encode()])
    size = rows, int(np.prod(rest))
    leading = common.normal(size=(rows, 2)) @ common.normal(size=(2, size[1]))
    return torch.from_numpy(leading + 0.3 * own.normal(size=size)).float().view(SHAPES[name])


class Workers:
    """So many, each with its parameters, gradients and state, who meet for every mean."""

    def __init__(self, count):
        self.barrier, self.given, self.sent = Barrier(count), [None] * count, 0
        self.members = []
        for worker in range(count):
            parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
            optimizer = torch.optim.SGD(parameters)
            lore = GreedyLore(optimizer, RANK, EVERY, partial(self.mean, worker))
            self.members.append((parameters, lore))

    def mean(self, worker, tensors):
        self.given[worker] = [tensor.clone() for tensor in tensors]
        self.barrier.wait()
        means = [torch.stack(of_all).mean(0) for of_all in zip(*self.given, strict=True)]
        if worker == 0:
            self.sent += sum(tensor.numel() for tensor in tensors)
        self.barrier.wait()
        return means

    def step(self, step, gradient=gradient):
        """What every worker has in the place of its gradients, by name."""

        def of_worker(worker):
            parameters, lore = self.members[worker]
            gradients = [gradient(name, step, worker) for name in SHAPES]
            lore.average(parameters, gradients, step)
            return dict(zip(SHAPES, gradients, strict=True))

        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(of_worker, range(len(self.members))))

    def error(self, worker, name):
        parameters, lore = self.members[worker]
        return lore.optimizer.state[parameters[list(SHAPES).index(name)]]["lore_error"]


def wide(name, x):
    matrix = x.double().numpy().reshape(len(x), -1)
    return matrix if matrix.shape == FACTORED[name] else matrix.T


def probe(name, step):
    """The Gaussian numbers of a step and layer, which are the same on all workers."""
    digest = hashlib.sha256(f"{step}/{list(SHAPES).index(name)}".encode()).digest()
    seeded = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(FACTORED[name], generator=seeded).double().numpy()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_means_and_errors_are_the_algorithms(count):
    workers = Workers(count)
    references = {
        name: baseline_reference.GreedyLore(count, shape, RANK, EVERY)
        for name, shape in FACTORED.items()
    }
    for step in range(STEPS):
        found = workers.step(step)
        for name in SHAPES:
            gradients = [gradient(name, step, worker) for worker in range(count)]
            for other in found[1:]:
                assert torch.equal(found[0][name], other[name])
            if name not in FACTORED:
                torch.testing.assert_close(found[0][name], torch.stack(gradients).mean(0))
                continue
            matrices = [wide(name, one) for one in gradients]
            expected = references[name].average(matrices, probe(name, step))
            np.testing.assert_allclose(wide(name, found[0][name]), expected, atol=2e-4)
            for worker, error in enumerate(references[name].errors):
                np.testing.assert_allclose(workers.error(worker, name), error, atol=2e-4)
    # No direction was so near to the last one taken that rounding could have chosen otherwise.
    assert min(reference.gap for reference in references.values()) > 1e-5


def test_what_is_sent_is_the_mean_in_the_end():
    """What steps leave out is in the errors, and whole steps send those too: nothing is lost."""
    workers, total, given = Workers(2), torch.zeros(12, 20), torch.zeros(12, 20)
    for step in range(2 * EVERY + 1):
        total += workers.step(step)[0]["wide"]
        given += (gradient("wide", step, 0) + gradient("wide", step, 1)) / 2
        left = (workers.error(0, "wide") + workers.error(1, "wide")) / 2
        torch.testing.assert_close(total + left, given, atol=1e-4, rtol=1e-4)
        assert (left == 0).all() == (step % EVERY == 0)
    torch.testing.assert_close(total, given, atol=1e-4, rtol=1e-4)


def test_a_step_sends_m_and_r_n_numbers_of_a_matrix_and_others_whole():
    workers = Workers(2)
    dense = sum(int(np.prod(shape)) for shape in SHAPES.values())
    workers.step(0)
    assert workers.sent == dense
    workers.step(1)
    factors = sum(m + RANK * n for m, n in FACTORED.values())
    assert workers.sent == dense + factors + 4 + 15


def test_of_equal_gradients_of_that_rank_nothing_is_lost():
    """The subspace is found by the whole step, and probes see none of the other directions."""

    def low_rank(name, step, worker):
        rng = np.random.default_rng([*name.encode()])
        rows, *rest = SHAPES[name]
        x = rng.normal(size=(rows, 2)) @ rng.normal(size=(2, int(np.prod(rest))))
        return (step + 1) * torch.from_numpy(x).float().view(SHAPES[name])

    workers = Workers(2)
    for step in range(4):
        found = workers.step(step, low_rank)[0]
        for name in SHAPES:
            expected = low_rank(name, step, 0)
            torch.testing.assert_close(found[name], expected, atol=2e-4, rtol=1e-4)


def test_gradients_that_are_not_finite_stay_so():
    workers = Workers(2)

    def broken(name, step, worker):
        return gradient(name, step, worker).fill_(float("nan") if worker else 1.0)

    assert workers.step(0, broken)[0]["wide"].isnan().all()


def test_what_it_remembers_is_in_the_optimizers_state():
    workers, others = Workers(1), Workers(1)
    for step in range(3):
        workers.step(step)
    optimizers = [one.members[0][1].optimizer for one in (workers, others)]
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for step in (3, 4, 5):
        (found,), (expected,) = others.step(step), workers.step(step)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
