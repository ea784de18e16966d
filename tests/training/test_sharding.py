"""Runs whose model is spread over the ranks of a worker."""

import json
from pathlib import Path

import pytest
import torch
from logs import repeatable
from run import launch, torchrun
from workers.sharding import SMALL, graphs

import sample
from training.workers import Workers

OVERRIDES = [
    *("ranks_per_worker=2", "checkpoint.every=4", "compressor@w2s=topk", "compressor@s2w=natural"),
    *("diagnostics_every=3", "batch.global_size=8"),
]


def test_a_sharded_model_has_the_same_losses_bytes_and_checkpoint(small, tmp_path):
    """Of two workers of two ranks, which read unlike numbers of the ten test windows.

    Of two forward passes a step, also where blocks are computed again.
    """
    runs = {}
    for shard in ("false", "true"):
        directory, again = tmp_path / shard, f"model.activation_checkpointing={shard}"
        place = f"fsdp={shard}", f"directory={directory}"
        result = launch(4, *small, *OVERRIDES, *place, again)
        assert "2 workers of 2 ranks on cpu, " in result.stdout
        runs[shard] = repeatable(directory)
    assert [one["record"] for one in runs["true"]].count("eval") == 2
    whole, sharded = (
        [{k: v for k, v in one.items() if k not in ("config", "overrides")} for one in records]
        for records in runs.values()
    )
    assert sharded == whole
    (watched,) = (one for one in whole if one["record"] == "diagnostics")
    assert watched["step"] == 3
    models = [sample.load_model(tmp_path / shard).state_dict() for shard in runs]
    for name, tensor in models[0].items():
        assert torch.equal(models[1][name], tensor)
    assert watched["layers"].keys() == models[0].keys()  # of both ranks of a worker


def reports_of_two(directory: Path, *what: str) -> list[dict]:
    """What two ranks of a worker report of models that they share."""
    torchrun("sharding.py", directory, *what, ranks=2)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return reports_of_two(tmp_path_factory.mktemp("ranks"))


def test_a_model_is_sharded_before_it_has_values(two_ranks):
    """No rank ever has more than its rows, a layer, and the numbers of a layer's fingerprint."""
    for rank in two_ranks:
        assert rank["small is as whole"] and rank["large is as whole"] and rank["is of rank 0"]
        assert rank["kept"] == pytest.approx(0.5, abs=0.01)
        assert rank["kept"] < rank["peak"] < 0.75


def test_gradients_of_several_passes_are_reduced_once(two_ranks):
    for rank in two_ranks:
        assert rank["scatters"] == 1 + rank["layers"]  # the root and every block
        assert rank["of every pass"] == 3 * rank["scatters"]
        assert rank["to every pass"] < 1e-6 and rank["to whole"] < 1e-6


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sharded_model_is_compiled_in_parts(request, tmp_path, ranks):
    """In what comes before the blocks, in a block and in the head: all but the tables' two cuts.

    Whole or sharded, tests add graphs without gradients, of a whole batch and of the last one. One
    rank is this process.
    """
    if ranks == 1:
        request.getfixturevalue("process_group")
    for rank in reports_of_two(tmp_path, "graphs") if ranks == 2 else [graphs(Workers())]:
        (whole,), parts = rank["whole"], rank["sharded"]
        before, block, head = parts
        assert before + SMALL.layers * block + head == whole - 2
        for kind, count in (("whole", 1), ("sharded", 3)):
            assert rank[f"{kind}, second step"] == 0
            assert rank[f"{kind}, tests"] == 2 * count
            assert rank[f"{kind}, distance"] < 1e-6


def test_sharded_models_leave_no_groups_but_those_of_their_mesh(two_ranks):
    for rank in two_ranks:
        assert len(rank["groups"]) == 6 and len({*rank["groups"]}) == 1
