"""Names of earlier versions: overrides are refused with today's, older logs are read in them."""

import pytest
from logs import END, write_log
from omegaconf import OmegaConf
from study_page import logs

from model import GPT
from training.config import build, compose, what_matters
from training.log import completed
from training.method import build_optimizer, run_label
from training.records import read_log
from training.renamed import modern_label, modern_overrides, modern_run
from training.workers import RunError

# Overrides of earlier versions beside which the refused one stands, the refused one, and today's.
RENAMED = [
    ("", "worker_size=2", "ranks_per_worker=2"),
    ("", "shard=true", "fsdp=true"),
    ("", "exchange=host", "transport=host"),
    ("", "batch.sequences=32", "batch.global_size=32"),
    ("", "batch.per_forward=4", "batch.micro_size=4"),
    ("", "model.checkpoint_blocks=true", "model.activation_checkpointing=true"),
    ("", "optimizer.beta=0.2", "optimizer.momentum=0.8"),
    ("", "optimizer.beta=1", "optimizer.momentum=0"),
    ("", "optimizer.beta=0.05", "optimizer.momentum=0.95"),
    ("", "optimizer.momentum=mvr", "optimizer.momentum_kind=mvr"),
    ("", "optimizer.momentum=hessian", "optimizer.momentum_kind=hessian"),
    ("", "optimizer.momentum=polyak", "optimizer.momentum_kind=polyak"),
    ("", "optimizer.momentum_start=zero", "optimizer.momentum_init=zero"),
    ("", "optimizer.first_message=exact", "optimizer.first_message=full"),
    ("optimizer=local", "optimizer.every=10", "optimizer.sync_every=10"),
    ("optimizer=local", "optimizer.every={0:120,360:60}", "optimizer.sync_every={0:120,360:60}"),
    ("optimizer=local", "optimizer.stagger=true", "optimizer.streaming=true"),
    ("optimizer=local", "optimizer.delay=2", "optimizer.sync_delay=2"),
    ("optimizer=local", "optimizer.inner.beta=0.2", "optimizer.inner.momentum=0.8"),
    (
        "optimizer=muloco",
        "optimizer.inner.hidden.momentum_start=gradient",
        "optimizer.inner.hidden.momentum_init=gradient",
    ),
    ("optimizer=muloco", "optimizer.inner.hidden.beta=0.1", "optimizer.inner.hidden.momentum=0.9"),
    ("optimizer=muon_greedylore", "optimizer.every=100", "optimizer.refresh_every=100"),
    (
        "optimizer=adamw optimizer.hook=greedylore",
        "+optimizer.every=100",
        "+optimizer.refresh_every=100",
    ),
    ("", "compressor@w2s=dense", "compressor@w2s=quantize"),
    ("", "compressor@s2w=dense", "compressor@s2w=quantize"),
    ("", "compressor@w2s=fitted_rank", "compressor@w2s=quantized_rank"),
    ("", "compressor@w2s=dropout", "compressor@w2s=bernoulli"),
    ("", "compressor@w2s=damping", "compressor@w2s=scaled"),
    ("", "+compressor@norm.embedding.w2s=dense", "+compressor@norm.embedding.w2s=quantize"),
    ("compressor@w2s=sign", "w2s.values=sign@message", "w2s.values=sign@tensor"),
    ("compressor@w2s=rank", "w2s.values=smooth4", "w2s.values=rowcol4"),
    (
        "compressor@w2s=rank",
        "w2s.values={format: int5, stochastic: false}",
        "w2s.values={format: int5, rounding: nearest}",
    ),
    (
        "compressor@w2s=rank",
        "w2s.values={format:int5,stochastic:true}",
        "w2s.values={format:int5,rounding:stochastic}",
    ),
]


@pytest.mark.parametrize(("beside", "old", "new"), RENAMED, ids=[old for _, old, _ in RENAMED])
def test_an_override_in_an_old_name_is_refused_with_todays(beside, old, new):
    with pytest.raises(RunError) as error:
        compose((*beside.split(), old))
    assert str(error.value) == f"{old} has been renamed: give {new}"
    assert compose((*beside.split(), new)).overrides[-1] == new


@pytest.mark.parametrize(
    "override",
    [
        *("optimizer.momentum=0.8", "optimizer.momentum_kind=mvr", "w2s=sign@tensor"),
        *("w2s=topk:0.05", "label=every-decay-dense", "compressor@w2s=quantize"),
    ],
)
def test_todays_names_are_not_refused(override):
    assert compose((override,)).overrides == (override,)


# Runs of an older version in results/shakespeare, and their labels today.
LOGS = {
    "identity-seed0": "identity",
    "local30-signs-seed0": (
        "top 30% sign, sync every 30, error decay 0.5, outer lr 1, outer momentum 0.3"
    ),
    "local120-60-signs-seed0": (
        "top 30% sign, sync every 120, 60 from step 361, error decay 0.5, outer lr 1, outer "
        "momentum 0.3"
    ),
    "local4-signs-message-seed0": (
        "sign, hidden sign@tensor, sync every 4, error decay 0.5, outer lr 1, outer momentum 0.3"
    ),
    "rank40-int5-seed0": "rank 40% int5:nearest",
    "smooth4-seed0": "quantize rowcol4",
    "served6-seed0": (
        "quantized rank 6% normal2 x normal4, embedding quantized rank 20% normal2 x normal4, "
        "EF14, error decay 0.92, server momentum 0.7"
    ),
    "local6-12-seed0": (
        "quantize normal2, sync every 6, 12 from step 361, outer lr 1, outer momentum 0.3"
    ),
    "muloco-seed0": (
        "quantize statistical2, sync every 30, AdamW, error decay 0.9, outer lr 0.9, "
        "outer momentum 0.3"
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_an_older_log_is_read_in_todays_words(name):
    """As a run of today with the same overrides, but for options that there were not."""
    old, _ = logs()[name]
    read = modern_run(old)
    assert read == modern_run(read)
    assert read["config"] != old["config"]
    today = compose(tuple(read["overrides"])).config
    matters = what_matters(OmegaConf.to_container(today, resolve=True))
    for key, value in what_matters(read["config"]).items():
        assert matters[key] == value or (key, matters[key]) == ("optimizer.server", "auto")
    assert read["label"] == LOGS[name]
    label = run_label(build_optimizer(today, GPT(build(today.model, "model"))))
    assert modern_label(label) == label
    assert label == LOGS[name].replace(
        "top 30% sign", "sign"
    )  # what was sent instead, as it is less


def test_all_logs_of_the_study_are_read_in_todays_words_again_and_again():
    for name, (run, _) in logs().items():
        read = modern_run(run)
        assert modern_run(read) == read, name
        assert modern_overrides(read["overrides"]) == read["overrides"], name


def test_a_completed_run_of_an_older_version_is_found_in_todays_names(tmp_path):
    """So that a sweep skips it, and a run that resumes compares it."""
    run, evals = logs()["local30-signs-seed0"]
    write_log(tmp_path, run, *evals, END)
    found = completed(tmp_path)
    assert "every" not in found["optimizer"] and found["optimizer"]["sync_every"] == 30
    assert found == modern_run(run)["config"] == read_log(tmp_path / "metrics.jsonl").run["config"]
