"""Four ranks as two workers of two against two ranks; see tests/support/workers/hierarchy.py."""

import re

import numpy as np
import pytest
from run import torchrun
from workers.hierarchy import CASES, MISSING, OF_ONE_WORKER, SHAPES, SHARDED

ENTRIES = sum(m * n for m, n in SHAPES.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results by rank: of 4 ranks as 2 workers, and of 2 ranks."""
    results = []
    for ranks, size in ((4, 2), (2, 1)):
        directory = tmp_path_factory.mktemp(f"hierarchy{ranks}")
        torchrun("hierarchy.py", directory, size, ranks=ranks)
        results.append([dict(np.load(directory / f"rank{rank}.npz")) for rank in range(ranks)])
    return results


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Results by rank of 4 ranks with sharded parameters, as workers of 2 ranks and as one."""
    results = {}
    for size in (2, 4):
        directory = tmp_path_factory.mktemp(f"sharded{size}")
        torchrun("hierarchy.py", directory, size, "sharded", ranks=4)
        results[size] = [dict(np.load(directory / f"rank{r}.npz")) for r in range(4)]
    return results


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_parameters_take_the_same_steps_and_bytes(runs, sharded, case):
    """Bit for bit, since a sum of two has one order; and nothing else is sent between workers."""
    for found, expected in zip(sharded[2], runs[0], strict=True):
        for what in ("model", "bytes", "state"):
            np.testing.assert_array_equal(found[f"{case} {what}"], expected[f"{case} {what}"])


@pytest.mark.parametrize("case", OF_ONE_WORKER)
def test_a_worker_of_all_ranks_takes_the_steps_of_one(sharded, case, alone):
    """But for the order of sums, and of the servers' own messages."""
    model = f"{case} model"
    for rank in sharded[4]:
        distance = np.linalg.norm(rank[model] - alone[model])
        assert distance < 1e-4 * np.linalg.norm(alone[model])
        np.testing.assert_array_equal(rank[model], sharded[4][0][model])
    states = [int(rank[f"{case} state"]) for rank in sharded[4]]
    assert sum(states) == int(alone[f"{case} state"]) and max(states) < 0.5 * sum(states)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    torchrun("hierarchy.py", directory, 1, ranks=1)
    return dict(np.load(directory / "rank0.npz"))


def test_what_cannot_be_stepped_in_shards_is_refused(sharded):
    shape = r"a parameter of shape \(12, 20\)"
    expected = [
        rf"{shape} is sharded: EF21Muon steps whole matrices; give a WorkerMesh with .*=2 as mesh",
        rf"{shape} is sharded: LocalSteps steps whole matrices; give a WorkerMesh with .*=2 as me",
        rf"{shape} is sharded over ranks .*, and the ranks of this worker are .*: .*_per_worker=4$",
        rf"{shape} is placed as .*Replicate.* on a mesh of 2 dimensions: shard its rows alone, by",
        rf"{shape} is placed as .*dim=1.* on a mesh of 1 dimensions: shard its rows alone, by",
        r"a parameter of shape \(16, 12\) is whole where others are sharded: call fully_shard for",
        rf"{shape} is on the meta device and has no values: load or initialise the model first$",
        "the model is in FullyShardedDataParallel, whose parameters are not matrices: shard it by",
    ]
    for rank in sharded[2]:
        refused = rank["refusals"][-len(expected) :]
        assert len(refused) == len(expected)
        for message, pattern in zip(refused, expected, strict=True):
            assert re.match(pattern, message), message


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("rank", "local, streaming")]
)
def test_two_ranks_a_worker_make_the_same_steps_as_one(runs, case):
    """But for the order of sums.

    Random sketches are drawn by other ranks, so not for RankK; and each rank has turns of its own.
    """
    four, two = runs
    found, expected = four[0][f"{case} model"], two[0][f"{case} model"]
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_hold_the_same_model(runs, case):
    for rank in runs[0][1:]:
        np.testing.assert_array_equal(rank[f"{case} model"], runs[0][0][f"{case} model"])


@pytest.mark.parametrize("case", CASES)
def test_what_crosses_between_workers_is_of_two_workers_and_not_of_four(runs, case):
    four, two = runs
    for first in (0, 2):
        of_worker = four[first][f"{case} bytes"] + four[first + 1][f"{case} bytes"]
        assert list(of_worker[:2]) == list(two[0][f"{case} bytes"][:2])
    of_ranks = [[int(rank[f"{case} bytes"][2]) for rank in run] for run in runs]
    assert sum(of_ranks[0]) == sum(of_ranks[1]) > 0
    sending = [sent > 0 for sent in of_ranks[0]]
    assert all(sending) if case != "rank0" else any(sending)


@pytest.mark.parametrize("case", CASES)
def test_the_state_of_a_worker_is_spread_over_its_ranks(runs, case):
    of_four = [int(rank[f"{case} state"]) for rank in runs[0]]
    of_two = [int(rank[f"{case} state"]) for rank in runs[1]]
    assert sum(of_four) == sum(of_two)
    assert max(of_four) < 0.75 * max(of_two)


def test_a_mesh_clips_the_gradient_of_the_worker_and_not_of_a_rank(runs, sharded):
    for rank in (*runs[0], *sharded[2], *sharded[4]):
        assert rank["clipped"].shape == (3,) and (rank["clipped"] < 1e-6).all()


def test_what_one_rank_of_a_worker_refuses_all_ranks_refuse(runs):
    for rank in runs[0]:
        assert list(rank["refusals"]) == [
            "ranks_per_worker=3 does not divide 4 ranks: give a divisor",
            "ranks_per_worker=0 does not divide 4 ranks: give a divisor",
            "w2s='topk' lacks its fraction: write topk:FRACTION[:VALUES] (group head)",
            "w2s has compressors for hidden, and none for the group 'head': give every group an "
            "entry 'name', and a compressor for it",
        ]


def test_a_check_reports_workers_that_have_diverged(runs, sharded):
    for rank in (*runs[0], *sharded[2]):
        assert "differs between rank 0 and rank 1: all workers hold the same" in str(
            rank["diverged"]
        )


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("shard", [False, True])
def test_missing_gradients_are_named_or_zero_on_all_ranks(runs, sharded, shard, local):
    """Whichever rank holds the layer, whole or in shards, and whoever was asked to have zeros."""
    method = "LocalSteps" if local else "EF21Muon"
    for rank in sharded[2] if shard else runs[0]:
        said = dict(zip(MISSING, rank[f"missing {local}"], strict=True))
        assert said["named"].startswith("key has no gradient: every parameter given to " + method)
        assert ("set_requires_gradient_sync(True)" in said["named"]) == shard
        assert said["zero"] == "query value fc"
        for nothing in ("nothing", "unreduced"):
            assert said[nothing].startswith(f"none of the parameters of {method} has a gradient, ")
            assert ("set_requires_gradient_sync(True)" in said[nothing]) == shard
        assert said["continues"] == " ".join(SHAPES)


def test_an_overflow_in_a_layer_of_another_rank_is_skipped_by_all(runs, sharded):
    for rank in runs[0]:
        assert list(rank["overflow"]) == [0, 0]
    for rank in sharded[2]:
        assert "GradScaler does not see the gradients of a sharded" in str(rank["overflow"])
