"""Configurations: presets compose, sweeps expand, names tell them apart."""

import re

import pytest
import torch
from hydra.errors import HydraException

from model import GPT
from training import config as configuration
from training.config import CONFIGS, build, compose, sweep
from training.data import share_of_batch
from training.workers import RunError


def test_more_workers_than_windows():
    from data.loader import WorkerBatches

    with pytest.raises(ValueError, match="use at most 3 workers"):
        WorkerBatches(range(100), 32, worker=0, workers=4, seed=0)


def test_workers_must_divide_the_batch(small):
    config = compose((*small, "batch.global_size=3")).config
    with pytest.raises(RunError, match=r"batch\.global_size=3 cannot be split over 2 workers"):
        share_of_batch(config, 2)


@pytest.mark.parametrize(
    ("global_size", "micro_size", "workers", "expected"),
    [(16, 8, 2, 8), (16, 8, 1, 8), (12, 4, 2, 3), (256, 16, 8, 16), (2, 8, 2, 1), (14, 4, 2, 1)],
)
def test_forward_passes_are_equal_and_as_large_as_allowed(
    small, global_size, micro_size, workers, expected
):
    overrides = (f"batch.global_size={global_size}", f"batch.micro_size={micro_size}")
    assert share_of_batch(compose((*small, *overrides)).config, workers) == expected


def test_sweep_is_the_product_in_order():
    assert sweep(["steps=5", "compressor@w2s=identity,topk", "seed=0,1"], multirun=True) == [
        ("compressor@w2s=identity", "seed=0", "steps=5"),
        ("compressor@w2s=identity", "seed=1", "steps=5"),
        ("compressor@w2s=topk", "seed=0", "steps=5"),
        ("compressor@w2s=topk", "seed=1", "steps=5"),
    ]
    assert sweep(["w2s=sign,rank:0.1:int4"], multirun=True) == [
        ("w2s=sign",),
        ("w2s=rank:0.1:int4",),
    ]
    assert sweep(["seed=range(0,3)"], multirun=True) == [("seed=0",), ("seed=1",), ("seed=2",)]


def test_names_tell_overrides_and_tell_configurations_apart(small):
    def name(*overrides, workers=2):
        return compose(overrides).name(workers)

    overrides = ("compressor@w2s=topk", "w2s.fraction=0.05")
    assert re.fullmatch(r"w2s=topk,w2s\.fraction=0\.05-[0-9a-f]{8}", name(*overrides))
    assert name(*overrides) == name(*overrides)
    assert re.fullmatch(r"w2s=topk-0\.05-int4-[0-9a-f]{8}", name("w2s=topk:0.05:int4"))
    assert name(*overrides) != name(*overrides, workers=4)
    assert name("seed=1") != name("seed=2")
    assert name("runs=elsewhere", "wandb.mode=offline", "log_every=5") == name()
    assert name().startswith("default-")
    assert "/" not in name("data.train=/some/where/*.bin")
    assert len(name(*(f"data.name={'x' * 300}",))) < 120


COMPRESSORS = {path.stem for path in CONFIGS.glob("compressor/*.yaml")}
PROMISE_NOTHING = {"quantized_rank", "statistical", "chunk_topk"}


def both_ways(compressor):
    return compose((f"compressor@w2s={compressor}", f"compressor@s2w={compressor}")).config


@pytest.mark.parametrize("compressor", sorted(COMPRESSORS))
def test_every_compressor_composes(compressor):
    for direction in ("w2s", "s2w"):
        alpha = build(both_ways(compressor)[direction], direction).alpha(64, 32)
        assert alpha == 0 if compressor in PROMISE_NOTHING else 0 < alpha <= 1


@pytest.mark.parametrize("compressor", sorted(COMPRESSORS))
def test_every_compressors_file_names_the_spec_of_the_same_compressor(compressor):
    first = (CONFIGS / "compressor" / f"{compressor}.yaml").read_text().splitlines()[0]
    spec = re.fullmatch(r"# .*\. Spec: (\S+)", first)[1]
    chosen = both_ways(compressor).w2s
    assert repr(build(chosen, "w2s")) == repr(build(compose((f"w2s={spec}",)).config.w2s, "w2s"))


def test_every_configuration_says_first_what_it_is():
    for path in CONFIGS.rglob("*.yaml"):
        first, second, *_ = [*path.read_text().splitlines(), ""]
        assert (second if first == "# @package _global_" else first).startswith("# "), path


def test_sign_muons_file_names_overrides_that_compose():
    comment = (CONFIGS / "optimizer" / "sign_muon.yaml").read_text()
    overrides = ("w2s=sign@tensor", "+norm.embedding.w2s=identity")
    assert " ".join(overrides) in comment
    config = compose(("optimizer=sign_muon", *overrides)).config
    assert (config.w2s, config.norm.embedding.w2s) == ("sign@tensor", "identity")


def test_the_papers_setting_composes():
    config = compose(("experiment=paper", "w2s.fraction=0.1", "w2s.values=float32")).config
    assert (config.batch.global_size, config.model.context) == (256, 1024)
    assert (config.eval.every, config.eval.tokens) == (125, 10_485_760)
    assert config.data.rebuild == "python data/fineweb.py download --shards 103"
    with torch.device("meta"):
        model = GPT(build(config.model, "model"))
    assert sum(p.numel() for p in model.parameters()) == 123_568_128
    assert share_of_batch(config, 8) == 16


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "steps=7 optimizer.lr=1e-3 model.width=64 label=null data.train='a b'",
        "experiment=shakespeare compressor@w2s=topk w2s.fraction=0.1",
        "w2s=topk:0.1 +norm.embedding.w2s=sign +compressor@norm.hidden.w2s=rank",
        "~norm.hidden optimizer=local optimizer.sync_every={0:2,3:1}",
        "steps=${seed} model.layers=${model.heads}",
        *("stepz=1", "optimizer=none", "+steps=1", "~unheard", "w2s.k=1", "steps=[1", "steps=1,2"),
        *("model.width=x", "w2s=topk optimizer.momentun=1", "compressor@w2s=topk,rank"),
    ],
)
def test_what_tests_compose_is_what_hydra_composes(overrides):
    """See tests/support/shortcuts.py."""

    def outcome(compose):
        try:
            return compose(re.findall(r"(?:'[^']*'|\S)+", overrides))
        except HydraException as error:
            return repr(error)

    assert outcome(configuration._composed) == outcome(configuration._composed.__wrapped__)
