"""The tables of a run, from optimizers without a run."""

from types import SimpleNamespace

import pytest
import torch

from ef21_muon import EF21Muon
from ef21_muon.compressors import TopK
from ef21_muon.transport.load import Load
from model import GPT
from training.config import build, compose
from training.method import build_optimizer, run_label
from training.report import group_table, introduction

ALONE = SimpleNamespace(gather=lambda value: [value])


@pytest.fixture
def told():
    """The table of a small model's groups, for some overrides."""

    def table(*overrides):
        config = compose(("model=tiny", "model.layers=2", *overrides)).config
        return group_table(build_optimizer(config, GPT(build(config.model, "model"))), ALONE)

    return table


def test_bytes_are_those_of_all_layers_of_a_row(told):
    """Of eight 128 x 128 matrices in 9 bits a value."""
    text = told("compressor@w2s=natural")
    (line,) = (one for one in text.splitlines() if "128x128" in one)
    assert line.split()[:3] == ["hidden", "8", "128x128"]
    assert f"dense natural  {8 * 128 * 128 * 9 // 8:,}" in line


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ((), "a round a step, "),
        (("optimizer=local", "optimizer.sync_every=1"), "a round a step, "),
        (("optimizer=local",), "a round every 30 steps, "),
        (
            ("optimizer=local", "optimizer.sync_every={0:6,12:3}"),
            "a round every 6, 3 from step 13 steps",
        ),
    ],
)
def test_rounds_are_told(told, overrides, expected):
    assert expected in told(*overrides)


def test_where_servers_are_is_told_with_what_they_would_take_elsewhere():
    """Also where they are not at the first choice, on which machines have not agreed."""
    config = compose(("model=tiny", "model.layers=1")).config
    optimizer = build_optimizer(config, GPT(build(config.model, "model")))
    optimizer.placements = {"replicated": Load(5_000, 10), "sharded": Load(7_000, 4)}
    optimizer.server = "sharded"
    assert group_table(optimizer, ALONE).endswith(
        "servers sharded: the busiest ranks move 7,000 bytes and take 4 multiplications a round "
        "(replicated 5,000 and 10)"
    )


def test_each_role_is_stepped_by_the_inner_optimizer_that_is_given_for_it(told):
    lines = told("optimizer=muloco").splitlines()
    embedding, hidden = (next(x for x in lines if x.startswith(n)) for n in ("embed", "hidden"))
    assert "AdamW" in embedding and "AdamW" not in hidden and "Spectral" in hidden


@pytest.mark.parametrize(("steps", "said"), [(200, 0), (199, 1), (4, 1)])
def test_whole_gradients_that_come_once_are_told(process_group, steps, said):
    overrides = ("optimizer=muon_greedylore", "model.layers=1", f"steps={steps}")
    config = compose(overrides).config
    model = GPT(build(config.model, "model"))
    workers = SimpleNamespace(count=1, device=torch.device("cpu"), **vars(ALONE))
    run = SimpleNamespace(config=config, raw_model=model, workers=workers)
    run.optimizer = build_optimizer(config, model)
    told = "only the first step sends whole gradients: optimizer.refresh_every=200 is longer than steps="
    assert introduction(run).count(f"{told}{steps}\n") == said


TOP = ("compressor@w2s=topk", "w2s.values=sign")


@pytest.mark.parametrize(
    "overrides, label",
    [
        ((), "dense normal2, every 30"),
        (("optimizer.error_decay=0.5",), "dense normal2, every 30 decay 0.5"),
        (("optimizer.outer_momentum=0.3",), "dense normal2, every 30 outer 1/0.3"),
        (("optimizer.sync_delay=1",), "dense normal2, every 30 delay 1"),
        (("optimizer.feedback=ef21",), "dense normal2, every 30 EF21"),
        ((*TOP, "w2s.fraction=0.1"), "top 10% sign, every 30"),
        (
            (*TOP, "w2s.fraction=0.1", "optimizer.mean=senders"),
            "top 10% sign, every 30 mean over senders",
        ),
        ((*TOP, "w2s.fraction=0.3"), "dense sign, every 30"),  # which is less than their places
    ],
)
def test_a_label_tells_what_of_local_steps_is_not_the_default(overrides, label):
    config = compose(("model=tiny", "model.layers=1", "optimizer=local", *overrides)).config
    assert run_label(build_optimizer(config, GPT(build(config.model, "model")))) == label


def test_a_label_tells_what_all_ranks_of_a_worker_send():
    """Large layers send all signs, which are less than places; another rank has other layers."""
    top, own = TopK(0.3, "sign"), {"w2s": TopK(0.2)}
    first, second, third = (
        EF21Muon([{"name": name, "params": [torch.zeros(size, size)], **entries}], w2s=top)
        for name, size, entries in (("hidden", 128, {}), ("hidden", 8, {}), ("embedding", 8, own))
    )
    of_others = [], []  # what each has brought, call by call
    for one, brought in zip((second, third), of_others, strict=True):
        run_label(one, lambda own, brought=brought: brought.append(own) or [own])
    assert run_label(first) == "dense sign"
    calls = zip(*of_others, strict=True)
    label = run_label(first, lambda own: [own, *next(calls)])
    assert label == "top 30% sign, embedding top 20%"
