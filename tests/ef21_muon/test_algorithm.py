"""EF21Muon on 1 and 3 workers against reference.py of tests/support/; see workers/rounds.py."""

import hashlib
import json

import numpy as np
import pytest
import reference
import torch
from run import torchrun
from workers import rounds
from workers.rounds import (
    BETA,
    FRACTION,
    OF_SERVED,
    PAIRS,
    ROUNDS,
    SERVED,
    SETUPS,
    SHAPES,
    STOCHASTIC_PAIRS,
)

COMPRESSORS = {
    "identity": reference.quantize(reference.float32),
    "nearest": reference.quantize(reference.natural),
    "topk": reference.top_k(FRACTION, reference.float32),
    "topk nearest": reference.top_k(FRACTION, reference.natural),
    "rank": reference.rank_k(FRACTION, reference.float32),
    "rank nearest": reference.rank_k(FRACTION, reference.natural),
}
WORKERS = (1, 3)
PLAIN_PAIRS = [pair for pair in PAIRS if pair[1] == "identity"]
EQUAL = PLAIN_PAIRS + STOCHASTIC_PAIRS  # on any placement: what servers send draws nothing
LMOS = {name: reference.spectral_lmo for name in SHAPES} | {"head": reference.sign_lmo}
START = {name: rounds.start(name) for name in SHAPES}

# Relative to ||W||. Newton-Schulz multiplies small singular values by 3.4445^5 = 485: float32 noise
# of 3e-8 in a low-rank G comes out as 1e-5.
ONE_ROUND = 1e-5
# That noise returns through the gradients and flips some choices: an entry near the middle of two
# powers of two, or near the k-th largest, is sent otherwise (and error feedback sends the rest
# later), or a sign in the head's step changes. Noise of 1e-6 in every gradient entry moves the
# reference's own W by up to 1e-4 in plain pairs, in which only w2s loses anything and in float32,
# and by 3e-3 in the others; noise of 1e-5 by 3e-3 and 2e-2. Without error feedback W moves by 0.2.
MANY_ROUNDS = {pair: 1e-3 if pair in PLAIN_PAIRS else 3e-2 for pair in PAIRS}


def gradient(model, worker):
    """Of the worker's least squares, in closed form."""
    result = {}
    for name, layer in model.items():
        inputs, targets = (x.astype(np.float64) for x in rounds.least_squares(name, worker))
        result[name] = (layer @ inputs - targets) @ inputs.T / inputs.shape[1]
    return result


def flat(model):
    return np.concatenate([layer.ravel() for layer in model.values()])


class Sketches:
    """The Gaussian sketches that one rank draws for one purpose, batch by batch."""

    def __init__(self, rank, purpose):
        digest = hashlib.sha256(f"{rounds.SEED}/{rank}/{purpose}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def draw(self, batches):
        """batches: lists of layers of one shape."""
        drawn = {}
        for names in batches:
            shape = rounds.matrix_shape(names[0])
            rank = reference.rank_of(FRACTION, shape)
            if rank and names != ["head"]:
                size = (len(names), min(shape), rank)
                sketches = torch.randn(size, generator=self.generator).double().numpy()
                drawn |= dict(zip(names, sketches, strict=True))
        return drawn


def served(layout, rank):
    """The layers that the rank serves, by batch."""
    parts = [names[sum(counts[:rank]) : sum(counts[: rank + 1])] for names, counts in layout]
    return [part for part in parts if part]


def run_reference(pair, layout, workers, algorithm=reference.Algorithm, **options):
    """W after every round, (ROUNDS, entries)."""
    w2s, s2w = (
        dict.fromkeys(SHAPES, COMPRESSORS[of_body]) | {"head": COMPRESSORS[of_head]}
        for of_body, of_head in zip(pair, rounds.head_pair(pair), strict=True)
    )
    algorithm = algorithm(START, workers, LMOS, BETA, w2s, s2w, **options)
    of_workers = [Sketches(worker, "w2s") for worker in range(workers)]
    of_servers = [Sketches(rank, "s2w") for rank in range(workers)]
    models = []
    for k in range(ROUNDS):
        radius = rounds.LR * rounds.DECAY**k
        radii = dict.fromkeys(SHAPES, radius) | {"head": radius * rounds.HEAD_RADIUS}
        gradients = [gradient(algorithm.model, worker) for worker in range(workers)]
        w2s_sketches = [
            sketches.draw(names for names, _ in layout) if "rank" in pair[0] else {}
            for sketches in of_workers
        ]
        s2w_sketches = {}
        if "rank" in pair[1]:
            for rank, sketches in enumerate(of_servers):
                s2w_sketches |= sketches.draw(served(layout, rank))
        algorithm.round(gradients, radii, w2s_sketches, s2w_sketches)
        models.append(flat(algorithm.model))
    return np.stack(models)


def distance(model, expected):
    return np.linalg.norm(model - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Of 1 and of 3 workers: what every rank recorded, the layouts, and every rank's errors."""
    arrays, layouts = rounds.collect(0)
    result = {1: ([arrays], layouts, [])}
    for workers in WORKERS[1:]:
        directory = tmp_path_factory.mktemp(f"rounds{workers}")
        torchrun("rounds.py", directory, ranks=workers)
        arrays = [dict(np.load(directory / f"rank{rank}.npz")) for rank in range(workers)]
        reports = [
            json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(workers)
        ]
        result[workers] = arrays, reports[0]["layouts"], [report["errors"] for report in reports]
    return result


@pytest.mark.parametrize(
    ("setup", "pair"),
    [(setup, pair) for setup in SETUPS for pair in rounds.pairs_of(setup) if pair in PAIRS],
)
@pytest.mark.parametrize("workers", WORKERS)
def test_rounds_agree_with_the_reference(recordings, workers, setup, pair):
    arrays, layouts, _ = recordings[workers]
    case = f"{setup} {'/'.join(pair)}"
    models = arrays[0][f"{case} model"]
    expected = run_reference(pair, layouts[case], workers)
    assert distance(models[0], expected[0]) < ONE_ROUND
    assert distance(models[-1], expected[-1]) < MANY_ROUNDS[pair]


@pytest.mark.parametrize("workers", WORKERS)
def test_momentum_at_the_server_agrees_with_the_reference(recordings, workers):
    arrays, layouts, _ = recordings[workers]
    layout = layouts[f"sharded {'/'.join(OF_SERVED)}"]
    expected = run_reference(OF_SERVED, layout, workers, reference.ServedAlgorithm, **SERVED)
    for of_rank in arrays:
        assert distance(of_rank["served model"][0], expected[0]) < ONE_ROUND
        assert distance(of_rank["served model"][-1], expected[-1]) < MANY_ROUNDS[OF_SERVED]


@pytest.mark.parametrize("pair", PAIRS[1:], ids="/".join)
def test_error_feedback_changes_the_rounds(recordings, pair):
    arrays, layouts, _ = recordings[3]
    case = f"sharded {'/'.join(pair)}"
    without = run_reference(pair, layouts[case], 3, error_feedback=False)
    assert distance(arrays[0][f"{case} model"][0], without[0]) < ONE_ROUND
    assert distance(arrays[0][f"{case} model"][-1], without[-1]) > 5 * MANY_ROUNDS[pair]


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_all_workers_hold_the_same_model(recordings, workers):
    first, *others = recordings[workers][0]
    models = [name for name in first if name.endswith("model")]
    assert len(models) == 1 + sum(len(rounds.pairs_of(setup)) + 1 for setup in SETUPS)
    for name in models:
        for other in others:
            np.testing.assert_array_equal(first[name], other[name], name)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_servers_gradient_is_the_mean_of_the_workers(recordings, workers):
    """Every round adds at most workers + 2 roundings of 2^-24 of what is added up."""
    arrays, layouts, _ = recordings[workers]
    for case in [*layouts, *(f"{setup} few" for setup in SETUPS)]:
        estimates = np.stack([of_rank[f"{case} estimate"] for of_rank in arrays]).astype(float)
        servers = np.stack([of_rank[f"{case} server"] for of_rank in arrays])
        expected = workers if "replicated" in case else 1
        assert (np.isfinite(servers).sum(0) == expected).all(), "every layer has its servers"
        error = np.nanmax(np.abs(servers - estimates.mean(0)), 0)
        allowed = ROUNDS * (workers + 2) * 2.0**-24 * np.abs(estimates).max((0, 1))
        assert (error <= allowed).all(), case


@pytest.mark.parametrize("layers", ["identity/identity", "few"])
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_without_compression_one_process_gets_the_same(recordings, workers, layers):
    """Of "few", two layers, one or two of three ranks serve none."""
    names = rounds.FEW_LAYERS if layers == "few" else tuple(SHAPES)
    of_rank = recordings[workers][0][0]
    alone, _ = rounds.record(PAIRS[0], "rank0", range(workers), names)
    for setup in SETUPS:
        models = of_rank[f"{setup} {layers} model"]
        assert distance(models[0], alone["model"][0]) < ONE_ROUND
        assert distance(models[-1], alone["model"][-1]) < MANY_ROUNDS[PAIRS[0]]


@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup != "sharded"])
@pytest.mark.parametrize("workers", WORKERS)
def test_placement_and_buckets_do_not_change_a_bit(recordings, workers, setup):
    arrays = recordings[workers][0][0]
    same = [pair for pair in rounds.pairs_of(setup) if setup == "unbucketed" or pair in EQUAL]
    assert same
    for pair in map("/".join, same):
        sharded, other = (arrays[f"{one} {pair} model"] for one in ("sharded", setup))
        np.testing.assert_array_equal(sharded, other, pair)


@pytest.mark.parametrize("difference", rounds.DIFFERENCES)
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_parameters_that_differ_between_ranks_are_refused(recordings, workers, difference):
    for errors in recordings[workers][2]:
        assert f"key differs between rank 0 and rank {workers - 1}" in errors[difference]


@pytest.mark.parametrize(
    ("habit", "message"),
    [
        ("too early", "ranks where there were 1 when the optimizer was built, which would send"),
        ("in DDP", "the model is in DistributedDataParallel, which sends whole gradients beside"),
    ],
)
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_other_processes_than_it_was_built_for_are_reported_by_every_rank(
    recordings, workers, habit, message
):
    for errors in recordings[workers][2]:
        assert message in errors[habit]


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_all_workers_skip_the_step_in_which_one_gradient_overflows(recordings, workers):
    """Under a GradScaler whose scale is a power of two: the steps without it, and one less."""
    arrays = recordings[workers][0]
    for of_rank in arrays:
        for name in rounds.SCALED:
            assert of_rank[f"{name} rounds"] == 3
            found = of_rank[f"{name} parameters"]
            np.testing.assert_array_equal(found, arrays[0]["plain parameters"])


@pytest.mark.parametrize("entry", rounds.OTHER_GROUPS)
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_numbers_of_groups_that_differ_between_ranks_are_reported(recordings, workers, entry):
    for errors in recordings[workers][2]:
        found = errors[entry]
        assert found.startswith(f"{entry} of group 0 is ") and f"on rank {workers - 1}: " in found


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_the_state_of_all_ranks_resumes_from_one_file(recordings, workers):
    for of_rank in recordings[workers][0]:
        np.testing.assert_array_equal(of_rank["went on"], of_rank["loaded"])


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_another_ranks_state_and_a_part_of_one_are_refused(recordings, workers):
    for rank, errors in enumerate(recordings[workers][2]):
        message = f"the state is of rank 0 (here {rank}): load it where it was saved, on every rank"
        assert errors["rank 0's state"].startswith(message if rank else "no error")
        assert errors["a part of it"].startswith("the state lacks what it is of, its counters")
