"""Runs whose model is spread over the ranks of a worker."""

import torch
from logs import repeatable
from run import launch

import sample

OVERRIDES = ["worker_size=2", "checkpoint.every=4", "compressor@w2s=topk", "compressor@s2w=natural"]


def test_a_sharded_model_has_the_same_losses_bytes_and_checkpoint(small, tmp_path):
    """Of two workers of two ranks, which read unlike numbers of the ten test windows.

    Also where blocks are computed again.
    """
    runs = {}
    for shard in ("false", "true"):
        directory, again = tmp_path / shard, f"model.checkpoint_blocks={shard}"
        place = f"shard={shard}", f"directory={directory}"
        result = launch(4, *small, *OVERRIDES, *place, again)
        assert "2 workers of 2 ranks on cpu, " in result.stdout
        runs[shard] = repeatable(directory)
    assert [one["record"] for one in runs["true"]].count("eval") == 2
    whole, sharded = (
        [{k: v for k, v in one.items() if k not in ("config", "overrides")} for one in records]
        for records in runs.values()
    )
    assert sharded == whole
    models = [sample.load_model(tmp_path / shard).state_dict() for shard in runs]
    for name, tensor in models[0].items():
        assert torch.equal(models[1][name], tensor)
