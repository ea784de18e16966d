"""The dry run against what an optimizer of a real model says."""

import re

import pytest
from a_round import a_round

from ef21_muon.layers import form_batches, lmo_costs
from model import GPT
from training.config import build, compose
from training.method import build_optimizer, run_label
from training.overlap import overlap
from training.plan import plan
from training.workers import RunError


@pytest.fixture(autouse=True)
def without_the_map(monkeypatch):
    """Plans end before the study's map, whose tests are those of test_overlap.py."""
    monkeypatch.setattr("training.plan.overlap", lambda *_: [])


def row(text, workers):
    """The cells of the table's row for this many workers, by heading."""
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    heading = next(line for line in lines if line[0] == "workers")
    found = next(line for line in lines if line[0] == str(workers) and len(line) == len(heading))
    return dict(zip(heading, found, strict=True))


def number(cell):
    return float(cell.replace(",", "").rstrip("%"))


@pytest.mark.parametrize("server", ["rank0", "sharded", "replicated"])
def test_bytes_are_those_of_the_optimizer(server):
    overrides = ("model=tiny", f"optimizer.server={server}", "compressor@w2s=topk", "steps=7")
    overrides += () if server == "replicated" else ("compressor@s2w=rank",)
    config = compose(overrides).config
    optimizer = build_optimizer(config, GPT(build(config.model, "model")))
    text = plan(config)
    found = row(text, 4)
    assert number(found["w2s per round"]) == a_round(optimizer).w2s_bytes
    s2w = 0 if server == "replicated" else a_round(optimizer).s2w_bytes
    assert number(found["s2w per round"]) == s2w
    assert number(found["w2s per run"]) == 7 * a_round(optimizer).w2s_bytes
    for workers in (2, 4, 8):
        seconds = 8 * most_sent(optimizer, server, workers) / 1e8
        found = row(text, workers)
        assert number(found["s at 10 Mbit/s"]) == pytest.approx(10 * seconds, rel=0.01)
        assert number(found["s at 100 Mbit/s"]) == pytest.approx(seconds, rel=0.01)
        assert number(found["s at 100 Gbit/s"]) == pytest.approx(seconds / 1000, rel=0.01)


def test_facts_and_shares_are_those_of_the_run():
    """A natural value has 9 bits of 32."""
    config = compose(("model=tiny", "compressor@w2s=natural", "steps=7")).config
    text = plan(config)
    lines = text.split("\n\n")[0].splitlines()[2:]
    facts = dict(re.split("  +", line, maxsplit=1) for line in lines)
    assert facts["parameters"] == "819,200" and facts["steps"] == "7"
    assert facts["tokens per step"] == "4,096" and facts["tokens"] == "28,672"
    assert facts["tokens per parameter"] == "0.035"
    assert number(row(text, 2)["of float32"]) == pytest.approx(100 * 9 / 32, abs=0.01)


@pytest.mark.parametrize("method", ["ef21_muon", "local"])
def test_a_placements_time_is_shared_by_the_steps_of_a_round(method):
    given = () if method == "ef21_muon" else ("optimizer.sync_every={0:6,12:3}",)
    overrides = ("model=tiny", "model.layers=3", f"optimizer={method}", "steps=24", *given)
    text = plan(compose(overrides).config).split("\n\n")[2]
    rows = {cells[0]: cells[1:] for cells in (re.split("  +", one) for one in text.splitlines())}
    for server in ("replicated", "sharded", "rank0"):
        for column, workers in enumerate((2, 4, 8)):
            size, _, seconds = rows[server][3 * column : 3 * column + 3]
            every = 1 if method == "ef21_muon" else 3
            assert float(seconds) == pytest.approx(8 * number(size) / 1e7 / every, rel=0.01)
            assert rows["servers"][3 * column] == f"max bytes per rank, {workers} workers"


ROLE = ("+compressor@norm.embedding.w2s=topk", "+compressor@norm.embedding.s2w=sign")


def test_a_role_may_have_compressors_of_its_own():
    config = compose(("model=tiny", *ROLE, "norm.embedding.w2s.fraction=0.5")).config
    optimizer = build_optimizer(config, GPT(build(config.model, "model")))
    of_role = {group["name"]: group for group in optimizer.param_groups}
    assert str(of_role["embedding"]["w2s"]) == "top 50% natural"
    default = "quantized rank 30% normal2 x normal4"
    assert str(of_role["hidden"]["w2s"]) == default
    assert run_label(optimizer) == (f"{default}, embedding top 50% natural, embedding back sign")
    found = row(plan(config), 4)
    assert number(found["w2s per round"]) == a_round(optimizer).w2s_bytes
    assert number(found["s2w per round"]) == a_round(optimizer).s2w_bytes


def test_a_baseline_takes_no_roles_compressor(process_group):
    for optimizer, lossless in (("dion", None), ("muon", True)):
        config = compose(("model=tiny", f"optimizer={optimizer}", *ROLE)).config
        for group in build_optimizer(config, GPT(build(config.model, "model"))).param_groups:
            assert getattr(group.get("w2s"), "lossless", None) is lossless
            assert getattr(group.get("s2w"), "lossless", None) is lossless


def most_sent(optimizer, server, ranks):
    """The most bytes that a rank sends to others, by the owners of the layers."""
    groups = optimizer.param_groups
    batches = form_batches(groups, lmo_costs(groups), server, 0, ranks)
    sent = [0] * ranks
    for batch in batches:
        owned = [len(batch.params[layers]) for layers in batch.owned_by]
        for rank in range(ranks):
            sent[rank] += (sum(owned) - owned[rank]) * batch.up.size
            if server != "replicated":
                sent[rank] += (ranks - 1) * owned[rank] * batch.down.size
    return max(sent)


def test_memory_is_that_of_the_state():
    """Alone, a worker would hold parameters, gradients, M, G_j and all of G: two hold half of G."""
    config = compose(("model=tiny", "optimizer.server=replicated", "compressor@w2s=topk")).config
    model = GPT(build(config.model, "model"))
    optimizer = build_optimizer(config, model)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert state == 3 * whole
    found = number(row(plan(config), 2)["GB per rank"])
    assert found == pytest.approx((2 * whole + state) / 1e9, abs=0.005)


@pytest.mark.parametrize(
    "overrides, copies",
    [
        (["compressor@w2s=topk"], 5),  # W, its gradient, M_j, G_j and G
        (["optimizer=local"], 7),  # x_j, its gradient, W, the error; inside M_j, G_j and G
        (["optimizer=local", "optimizer.outer_momentum=0.5"], 8),
        # Without an error, and AdamW's moments are not known before it steps.
        (["optimizer=diloco", "steps=500"], 4),
    ],
)
def test_memory_of_a_layer_of_124m_is_so_many_copies(overrides, copies):
    one_layer = ("model=gpt2-124m", "model.layers=1", "optimizer.server=replicated")
    config = compose((*one_layer, *overrides)).config
    found = number(row(plan(config), 2)["GB per rank"])
    parameters = 50304 * 768 + 12 * 768**2
    assert found == pytest.approx(copies * 4 * parameters / 1e9, abs=0.006)


@pytest.mark.parametrize(
    "preset",
    ["norm=euclidean", "norm=gluon", "experiment=paper norm=muon", "experiment=smoke124m"],
)
def test_every_preset_can_be_planned(preset, monkeypatch):
    if "paper" in preset:  # with the map
        monkeypatch.setattr("training.plan.overlap", overlap)
    text = plan(compose((*preset.split(), "model.layers=1")).config)
    assert number(row(text, 8)["of float32"]) < 10


def test_baselines_cannot_be_planned():
    with pytest.raises(RunError, match="give optimizer=ef21_muon"):
        plan(compose(("optimizer=adamw",)).config)
