"""The tables of a run, from optimizers without a run."""

import re
from types import SimpleNamespace

import pytest
import torch

from ef21_muon import EF21Muon
from ef21_muon.compressors import TopK
from ef21_muon.transport.load import Load
from model import GPT
from training.config import build, compose
from training.method import build_optimizer, run_label
from training.records import traffic
from training.report import group_table, introduction, result_table

ALONE = SimpleNamespace(gather=lambda value: [value])


@pytest.fixture
def groups():
    """The table of a small model's groups, for some overrides."""

    def table(*overrides):
        config = compose(("model=tiny", "model.layers=2", *overrides)).config
        return group_table(build_optimizer(config, GPT(build(config.model, "model"))), ALONE)

    return table


def test_bytes_are_those_of_all_layers_of_a_row(groups):
    """Eight 128 x 128 matrices have 9 bits per value."""
    text = groups("compressor@w2s=natural")
    (line,) = (one for one in text.splitlines() if "128x128" in one)
    assert line.split()[:3] == ["hidden", "8", "128x128"]
    assert f"natural  {8 * 128 * 128 * 9 // 8:,}" in line


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ((), "one round per step, "),
        (("optimizer=local", "optimizer.sync_every=1"), "one round per step, "),
        (("optimizer=local",), "one round per 30 steps, "),
        (
            ("optimizer=local", "optimizer.sync_every={0:6,12:3}"),
            "one round per 6, 3 from step 13 steps",
        ),
    ],
)
def test_rounds_are_named(groups, overrides, expected):
    assert expected in groups(*overrides)


def test_the_load_of_the_servers_is_named_with_that_of_other_placements():
    """Also where they are not at the first choice, on which machines have not agreed."""
    config = compose(("model=tiny", "model.layers=1")).config
    optimizer = build_optimizer(config, GPT(build(config.model, "model")))
    optimizer.placements = {"replicated": Load(5_000, 10), "sharded": Load(7_000, 4)}
    optimizer.server = "sharded"
    assert group_table(optimizer, ALONE).endswith(
        "servers sharded: per round, max traffic per rank 7,000 bytes, max multiplications per "
        "rank 4 (replicated 5,000 and 10)"
    )


def test_each_role_is_stepped_by_the_inner_optimizer_that_is_given_for_it(groups):
    lines = groups("optimizer=muloco").splitlines()
    embedding, hidden = (next(x for x in lines if x.startswith(n)) for n in ("embed", "hidden"))
    assert "AdamW" in embedding and "AdamW" not in hidden and "Spectral" in hidden


@pytest.mark.parametrize(("steps", "said"), [(200, 0), (199, 1), (4, 1)])
def test_whole_gradients_that_are_sent_once_are_named(process_group, steps, said):
    overrides = ("optimizer=muon_greedylore", "model.layers=1", f"steps={steps}")
    config = compose(overrides).config
    model = GPT(build(config.model, "model"))
    workers = SimpleNamespace(count=1, device=torch.device("cpu"), **vars(ALONE))
    run = SimpleNamespace(config=config, raw_model=model, workers=workers)
    run.optimizer = build_optimizer(config, model)
    warning = "only the first step sends whole gradients: optimizer.refresh_every=200 is longer "
    assert introduction(run).count(f"{warning}than steps={steps}\n") == said


TOP = ("compressor@w2s=topk", "w2s.values=sign")


@pytest.mark.parametrize(
    "overrides, label",
    [
        ((), "quantize normal2, sync every 30"),
        (("optimizer.error_decay=0.5",), "quantize normal2, sync every 30, error decay 0.5"),
        (
            ("optimizer.outer_momentum=0.3",),
            "quantize normal2, sync every 30, outer lr 1, outer momentum 0.3",
        ),
        (("optimizer.sync_delay=1",), "quantize normal2, sync every 30, sync delay 1"),
        (("optimizer.feedback=ef21",), "quantize normal2, sync every 30, EF21"),
        ((*TOP, "w2s.fraction=0.1"), "top 10% sign, sync every 30"),
        (
            (*TOP, "w2s.fraction=0.1", "optimizer.mean=senders"),
            "top 10% sign, sync every 30, mean over senders",
        ),
        ((*TOP, "w2s.fraction=0.3"), "sign, sync every 30"),  # which takes less than positions
    ],
)
def test_a_label_names_what_of_local_steps_is_not_the_default(overrides, label):
    config = compose(("model=tiny", "model.layers=1", "optimizer=local", *overrides)).config
    assert run_label(build_optimizer(config, GPT(build(config.model, "model")))) == label


def test_a_label_names_what_all_ranks_of_a_worker_send():
    """Large layers send all signs, which take less than positions; a rank has other layers."""
    top, own = TopK(0.3, "sign"), {"w2s": TopK(0.2)}
    first, second, third = (
        EF21Muon([{"name": name, "params": [torch.zeros(size, size)], **entries}], w2s=top)
        for name, size, entries in (("hidden", 128, {}), ("hidden", 8, {}), ("embedding", 8, own))
    )
    of_others = [], []  # what each has brought, call by call
    for one, brought in zip((second, third), of_others, strict=True):
        run_label(one, lambda own, brought=brought: brought.append(own) or [own])
    assert run_label(first) == "sign"
    calls = zip(*of_others, strict=True)
    label = run_label(first, lambda own: [own, *next(calls)])
    assert label == "top 30% sign, embedding top 20%"


def test_traffic_is_compared_with_float32_both_ways():
    """In 10 steps, 5,000 parameters of 4 bytes take 200,000 bytes each way."""
    record = {"step": 10, "w2s_bytes": 30_000, "received_bytes": 70_000}
    assert traffic(record | {"w2s_bytes": 1_250_000, "received_bytes": 350_000}, 5_000_000) == (
        "sent 1.2 MB, received 0.3 MB per worker, 250.0x less than uncompressed (both ways)"
    )
    assert traffic(record, 5_000) == (
        "sent 0.0 MB, received 0.1 MB per worker, 4.0x less than uncompressed (both ways)"
    )
    record = {"step": 1, "w2s_bytes": 0, "received_bytes": 0}
    assert traffic(record, 5_000) == "sent 0.0 MB, received 0.0 MB per worker"


def test_the_result_has_both_ways_and_their_ratio():
    """3 x 10^6 parameters in 20 steps: 240 MB each way, against 12.5 + 47.5 MB."""
    end = {"test_loss": 2.5, "tokens": 12_345, "seconds": 9.6, "optimizer_share": 0.25}
    end |= {"w2s_bytes": 12_500_000, "received_bytes": 47_500_000}
    uncompressed = 20 * 4 * 3_000_000
    lines = result_table(end | {"uncompressed_bytes": uncompressed}).splitlines()
    assert dict(re.split("  +", line, maxsplit=1) for line in lines[2:]) == {
        "test loss": "2.5000",
        "tokens": "12,345",
        "sent per worker": "12.5 MB (12,500,000 bytes)",
        "received per worker": "47.5 MB (47,500,000 bytes)",
        "uncompressed float32, both ways": "480.0 MB (480,000,000 bytes)",
        "ratio, both ways": "8.0x less",
        "training time": "10 s, 25% optimizer",
    }
