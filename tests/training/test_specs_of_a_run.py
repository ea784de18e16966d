"""w2s=SPEC and s2w=SPEC in whole runs: as the configurations of the same compressors."""

import json

import pytest
from logs import what_must_repeat
from workers.resume import around_steps, run_alone

from training.config import compose
from training.plan import plan
from training.resume import require_same_config
from training.workers import RunError

LOCAL = ("optimizer=local", "optimizer.sync_every=2")
# Specs, and the same compressors by their configurations.
PAIRS = {
    "ef21_muon": (
        "w2s=topk:0.1:int4 s2w=rank:0.5:natural",
        "compressor@w2s=topk w2s.fraction=0.1 w2s.values=int4 compressor@s2w=rank s2w.fraction=0.5",
    ),
    "local": (
        "optimizer=local optimizer.sync_every=2 w2s=sign@tensor",
        "optimizer=local optimizer.sync_every=2 compressor@w2s=sign w2s.values=sign@tensor",
    ),
    "a role": (
        "w2s=sign +norm.embedding.w2s=topk:0.2:natural",
        "compressor@w2s=sign +compressor@norm.embedding.w2s=topk norm.embedding.w2s.fraction=0.2",
    ),
}


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").open()]


def numbers(directory):
    run, *others = records(directory)
    return [run["label"], *map(what_must_repeat, others)]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_spec_trains_as_the_same_compressors_configuration(small, tmp_path, pair):
    for name, overrides in zip(("spec", "file"), PAIRS[pair], strict=True):
        run_alone(tmp_path / name, *small, "steps=2", *overrides.split())
    assert numbers(tmp_path / "spec") == numbers(tmp_path / "file")
    config = records(tmp_path / "spec")[0]["config"]
    for override in PAIRS[pair][0].split():
        if override.startswith(("w2s=", "s2w=")):
            key, spec = override.split("=")
            assert config[key] == spec, "the log has the spec"


@pytest.mark.parametrize("pair", PAIRS)
def test_a_dry_run_takes_specs(pair, monkeypatch):
    monkeypatch.setattr("training.plan.overlap", lambda *_: [])  # of the study's compressors
    spec, file = (
        plan(compose(("steps=8", *overrides.split())).config) for overrides in PAIRS[pair]
    )
    assert spec == file


def test_a_run_resumes_with_the_same_spec_alone(small, tmp_path):
    given = (*small, *LOCAL, "w2s=topk:0.1")
    run_alone(tmp_path / "whole", *given)

    def stop(run, step):
        if step == 4:
            raise RunError("interrupted")

    with pytest.raises(RunError, match="interrupted"), around_steps(before=stop):
        run_alone(tmp_path / "resumed", *given)
    saved = records(tmp_path / "resumed")[0]["config"]
    for other in ("w2s=topk:0.2", "compressor@w2s=topk"):
        with pytest.raises(RunError, match=r"w2s.*\(it has 'topk:0\.1'\)"):
            require_same_config(compose((*small, *LOCAL, other)).config, saved, tmp_path)
    run_alone(tmp_path / "resumed", *given, "resume=auto")
    whole, resumed = (
        [one for one in numbers(tmp_path / name) if one != "interrupted"]
        for name in ("whole", "resumed")
    )
    assert resumed == whole
