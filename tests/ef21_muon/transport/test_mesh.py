"""Workers of two ranks, and one of three; see tests/support/workers/mesh.py."""

import pytest
import torch
from newer_torch import OTHER_TYPES
from run import torchrun
from workers.mesh import PARTS, SENDS, SHAPES

KINDS = pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])


@pytest.fixture(scope="module", params=[(4, 2), (3, 3)], ids=["two", "three"])
def ranks(request, tmp_path_factory):
    """Results by rank, of workers of two ranks or of three."""
    count, size = request.param
    directory = tmp_path_factory.mktemp(f"mesh{count}")
    torchrun("mesh.py", directory, size, ranks=count)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(count)]


def by_worker(ranks: list[dict]) -> list[list[dict]]:
    size = ranks[0]["places"]["size"]
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]


def test_every_rank_has_its_place(ranks):
    size = ranks[0]["places"]["size"]
    for rank, found in enumerate(one["places"] for one in ranks):
        first = rank - rank % size
        assert found["worker"] == found["of rank"] == list(range(first, first + size))
        assert found["peers"] == list(range(rank % size, len(ranks), size))
        assert found["names"] == ("worker", "rank")
        assert found["mesh"] == torch.arange(len(ranks)).view(-1, size).tolist()
        assert found["stream"] == rank, "all ranks draw other random numbers"
        assert found["backends"] == ["gloo", "gloo"]
        assert found["total"] == [sum(found["worker"]), size * 2**40]


def test_every_layer_has_one_owner_in_a_worker_which_is_given_it(ranks):
    for worker in by_worker(ranks):
        of_worker = [rank["places"] for rank in worker]
        assert sorted(name for rank in of_worker for name in rank["own"]) == sorted(SHAPES)
        for rank in of_worker:
            assert rank["groups"] == [{"name": "all", "params": rank["own"], "lr": 1}]
            assert rank["bare"] == [len(rank["own"])]


@KINDS
def test_owners_get_the_mean_in_the_order_of_ranks_or_the_rows(ranks, shard):
    """Bit for bit: also in channels_last, in bfloat16, and where a rank has no rows."""
    for found in (rank[f"reduced {shard}"] for rank in ranks):
        assert found["own"] == found["exact"] == found["types"] == found["strides"] != []
        assert found["left"] == ([] if shard else found["own"])


def test_sums_are_near_those_of_torch(ranks):
    assert max(rank["near torch"] for rank in ranks) < 3e-7


@KINDS
@pytest.mark.skipif(not OTHER_TYPES, reason="torch has no gradients of other types")
def test_gradients_may_have_a_type_of_their_own(ranks, shard):
    """A whole copy's gradient is of its type."""
    expected = "torch.bfloat16" if shard else "torch.float32"
    for worker in by_worker(ranks):
        assert [one for rank in worker for one in rank[f"other types {shard}"]] == [expected]


@KINDS
def test_all_ranks_get_every_layer_as_its_owner_has_it(ranks, shard):
    for found in (rank[f"shared {shard}"] for rank in ranks):
        assert found["exact"] == list(SHAPES)
        assert found["untouched"], "an owner would take it for a change by others"
        assert found["gradients"] == (0 if shard else found["own"])
    rows = [rank[f"shared {shard}"]["rows"] for rank in ranks]
    assert any(0 in of_rank for of_rank in rows) == shard


@KINDS
def test_a_step_is_a_few_collectives_of_parts_of_the_model(ranks, shard):
    for found in (rank[f"steps {shard}"] for rank in ranks):
        for when in ("first", "then"):
            assert found[when].pop("all_reduce", 0) == (1 if shard else 0)
            assert found[when].keys() == {SENDS, "bytes"}
            assert found[when][SENDS] <= 2 * 2 * PARTS, "an owner has most of it"
            whole_layer = 0 if not shard else 4 * 90 * 8
            assert found[when]["bytes"] < 2 * found["model bytes"] / PARTS + whole_layer
    for found in (rank["at once"] for rank in ranks):
        assert found["then"][SENDS] == 2, "of a small model"


def test_shards_are_gathered_where_one_rank_has_written_to_one(ranks):
    for worker in by_worker(ranks):
        founds = [rank["steps True"] for rank in worker]
        for found in founds:
            assert found["written"][SENDS] == 3 / 2 * found["then"][SENDS]
            for when, times in (("first", 1), ("then", 1)):
                assert set(found[f"{when} seen"]) == {times}, "by the owner's own step alone"
            assert min(found["written seen"]) > 1
        assert sorted(name for one in founds for name in one["gathered"]) == sorted(SHAPES)


@KINDS
def test_all_ranks_enter_the_same_collectives_when_it_is_built(ranks, shard):
    for worker in by_worker(ranks):
        calls = [rank[f"steps {shard}"]["built"] for rank in worker]
        counts = [{name: call[name] for name in call if name != "bytes"} for call in calls]
        assert all(count == counts[0] for count in counts)


def test_it_shards_as_fully_shard_does(ranks):
    size = ranks[0]["places"]["size"]
    for distance, sent in (rank["by fully_shard"] for rank in ranks):
        assert distance == 0 if size == 2 else distance < 1e-6, "a sum of two has one order"
        assert sent == 2, "nothing but gradients, and what was stepped"


def test_what_one_rank_refuses_all_ranks_of_its_worker_refuse(ranks):
    for worker in by_worker(ranks):
        errors = [rank["errors"]["of one rank"] for rank in worker]
        assert errors[-1] == "KeyError: 'of the last rank'"
        assert set(errors[:-1]) == {"ValueError: 'of the last rank'"}


def test_what_is_no_mesh_is_refused_by_all(ranks):
    count, size = len(ranks), ranks[0]["places"]["size"]
    expected = {
        "no divisor": f"ranks_per_worker={count + 1} does not divide {count} ranks: give a divisor",
        "no number": "ranks_per_worker is missing: give it, or mesh",
        "none": f"ranks_per_worker=0 does not divide {count} ranks: give a divisor",
        "few layers": f"ranks_per_worker={size} leaves ranks without a layer: the model has 1, "
        "give at most as many",
        "mixed": "a parameter of shape (90, 8) is whole where others are sharded: call fully_shard "
        "for the whole model, too",
        "both": "mesh has its ranks, timeout and backends already: give it alone",
    }
    for rank in ranks:
        for what, message in expected.items():
            assert rank["errors"][what] == f"ValueError: {message}"
        flat = rank["errors"]["flat"]  # with torch's repr of it
        assert flat.startswith(f"ValueError: mesh=DeviceMesh((rank={count}), ")
        assert flat.endswith(") is not of all ranks as ('worker', 'rank'): give new_mesh(...)")


def test_its_end_leaves_no_process_group(ranks):
    """Nor what could not be built; a mesh that was given is left as it is."""
    for before, with_mesh, after, after_refusal, of_given in (rank["groups"] for rank in ranks):
        assert before == after == after_refusal
        assert with_mesh == of_given == before + 2


def test_a_copy_is_of_the_copied_layers_and_sends_by_the_same_groups(ranks):
    for rank in ranks:
        found = rank["copied"]
        assert found["own"] == rank["places"]["own"]
        assert found["changed"] == found["as before"] == list(SHAPES)
        assert found["groups"]


def test_layers_are_named_by_their_owners(ranks):
    for found in (rank["named"] for rank in ranks):
        assert found["names"] == [f"its {name}" for name in SHAPES]
        assert "a parameter of shape (12, 20) has no gradient" in found["before"]
        assert found["then"].startswith("GradientError: its query has no gradient")
        assert found["zero"] == "nothing"
