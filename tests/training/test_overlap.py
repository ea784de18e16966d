"""What a dry run says to be hidden, against what local steps take and send."""

import re
import shlex
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from a_round import a_round
from omegaconf import OmegaConf

from ef21_muon.transport.load import MULTIPLICATIONS_PER_BYTE
from ef21_muon.transport.schedule import SyncSchedule
from model import GPT
from training.config import build, compose, what_matters
from training.links import LINKS
from training.method import build_optimizer
from training.overlap import Exchange, _exchanges
from training.plan import plan
from training.study import MAP, WORKERS
from training.traffic import groups_of, loads_by_placement

TINY = ("model=tiny", "steps=600", "dry_run=true")
STEP, RATE, LATENCY = 0.25, 5e6, 0.05
LINK = ("plan.step_seconds=0.25", "plan.mbit=5", "plan.latency_ms=50")
EVERY = {
    **{"identity": 1, "served6": 1, "local4-signs": 4, "local10-signs": 10, "local30-signs": 30},
    **{"local60-signs": 60, "local120-60-signs": 60},
    **{"local10-dense2": 10, "local30-dense2": 30, "local60-dense2": 60},
    **{"local2-back": 2, "local4-back": 4, "local10-back6": 10},
    **{"local10-outer6": 10, "local30-outer6": 30},
}
BACK = [setting for setting in MAP if "-back" in setting.name]


def planned(*overrides, gpu=True):
    """What it prints where there is a GPU, by paragraphs."""
    with mock.patch("torch.cuda.is_available", return_value=gpu):
        return plan(compose((*TINY, *overrides)).config).split("\n\n")


def rows_of(paragraph):
    """Of a table: dicts by heading."""
    heading, _, *rows = (re.split("  +", line) for line in paragraph.splitlines())
    return [dict(zip(heading, cells, strict=True)) for cells in rows]


def by_setting(paragraph):
    """The cells of a table of settings, by name and number of workers."""
    names = {setting.words: setting.name for setting in MAP}
    return {
        (names[row["setting of the study"]], int(row["workers"])): row for row in rows_of(paragraph)
    }


def new_optimizer(setting, *more):
    config = compose((*TINY, *setting.overrides(compose(TINY).config), *more)).config
    return build_optimizer(config, GPT(build(config.model, "model")))


@pytest.fixture(scope="module")
def exchanges():
    """What all settings exchange, whatever the link."""
    config = compose(TINY).config
    with mock.patch("torch.cuda.is_available", return_value=True):
        return [*_exchanges(config, GPT(build(config.model, "model")))]


@pytest.fixture
def known_exchanges(exchanges, monkeypatch):
    monkeypatch.setattr("training.overlap._exchanges", lambda *_: exchanges)


@pytest.fixture(scope="module")
def at_this_link():
    return planned(*LINK)


@pytest.mark.parametrize("length", ["steps=59", "steps=600 schedule.cooldown=0"])
def test_settings_with_rounds_that_a_run_is_too_short_for_are_left_out(length):
    found = by_setting(planned(*length.split(), *LINK)[5])
    names = {name for name, _ in found}
    assert "local30-signs" in names and "local120-60-signs" not in names
    assert ("local60-signs" in names) == (length != "steps=59")


def test_without_a_link_there_is_the_map_alone(at_this_link):
    assert planned() == at_this_link[:6] and len(at_this_link) == 12


def test_the_shortest_step_is_what_the_messages_of_all_others_take(at_this_link):
    found = by_setting(at_this_link[5])
    assert found.keys() == {(name, workers) for name in EVERY for workers in WORKERS}
    replicated = [setting for setting in MAP[1:] if setting not in BACK]  # nothing comes back
    for setting in replicated:
        sent = a_round(new_optimizer(setting)).w2s_bytes
        for workers in WORKERS:
            row = found[setting.name, workers]
            size = (workers - 1) * sent
            assert row["bytes per round"] == f"{size:,}"
            for link, rate in LINKS.items():
                waits, _, seconds = row[link].rpartition(" ")
                steps = max(1, EVERY[setting.name] - 1)
                assert float(seconds) == pytest.approx(8 * size / rate / steps, rel=0.01)
                assert bool(waits) == (setting.name == "served6")


def test_placements_are_those_that_auto_takes(at_this_link, monkeypatch):
    found = by_setting(at_this_link[5])
    monkeypatch.setattr("training.plan.overlap", lambda *_: at_this_link[4:6])
    for setting in (MAP[0], MAP[2], BACK[0]):
        *_, placements, _, _, _ = planned(*setting.overrides(compose(TINY).config))
        for column, workers in enumerate(WORKERS):
            rows = [re.split("  +", line)[3 * column + 1 :] for line in placements.splitlines()[2:]]
            size, *_ = min(rows, key=lambda row: weight(*row[:2]))
            assert found[setting.name, workers]["bytes per round"] == size


def weight(size, multiplications):
    """As of a run on a GPU."""
    return int(size.replace(",", "")) + float(multiplications) / MULTIPLICATIONS_PER_BYTE["cuda"]


@pytest.mark.parametrize(("gpu", "server"), [(True, "replicated"), (False, "sharded")])
def test_servers_are_those_of_a_run_on_such_a_machine(gpu, server):
    """The LMO steps of a wide model take a CPU longer than what servers would send back."""
    wide = ("model=gpt2-124m", "model.width=3072", "compressor@w2s=topk", "w2s.fraction=0.01")
    config = compose(wide).config
    with torch.device("meta"):
        groups = groups_of(config, GPT(build(config.model, "model")))
    method = build(config.optimizer, "optimizer", _partial_=True)
    with mock.patch("torch.cuda.is_available", return_value=gpu):
        assert next(iter(loads_by_placement(method, groups, 8))) == server


@pytest.mark.parametrize("ways", [1, 2])
def test_the_longest_delay_is_that_of_the_library(ways):
    for setting in (one for one in MAP if one.name in ("local4-signs", "local120-60-signs")):
        rounds = new_optimizer(setting).rounds
        longest = Exchange(setting, 2, EVERY[setting.name], 1, ways).longest_delay
        batch = SimpleNamespace(replicated=ways == 1, params=[None], up=SimpleNamespace(size=1))
        SyncSchedule([[batch]], rounds, longest, streaming=False)
        with pytest.raises(ValueError, match=f"give at most {longest}$"):
            SyncSchedule([[batch]], rounds, longest + 1, streaming=False)


def test_a_message_arrives_before_its_delay_ends(at_this_link):
    sizes = by_setting(at_this_link[5])
    seen = set()
    for (name, workers), row in by_setting(at_this_link[7]).items():
        one_way = 8 * int(sizes[name, workers]["bytes per round"].replace(",", "")) / RATE + LATENCY
        ways = 2 if "-back" in name or name == "identity" else 1
        seconds = one_way + (ways - 1) * LATENCY
        assert float(row["s per round"]) == pytest.approx(seconds, rel=0.01)
        share = 100 * seconds / (seconds + EVERY[name] * STEP)
        assert float(row["waits"].rstrip("%")) == pytest.approx(share, abs=0.06)
        longest = (EVERY[name] - 1) // ways
        if row["hidden with"] == "nothing":
            assert one_way > longest * STEP
        else:
            delay = int(row["hidden with"].removeprefix("optimizer.sync_delay="))
            assert (delay - 1) * STEP < one_way <= delay * STEP and delay <= longest
        seen.add(row["hidden with"] != "nothing")
    assert seen == {True, False}


def test_both_ways_have_half_of_a_round_each():
    """A way might be that of all the bytes."""
    exchange = Exchange(MAP[3], 2, steps=10, size=1_000_000, ways=2)
    assert exchange.seconds(8e6, 0.5) == 2
    assert exchange.delay(1.5 / 4, 8e6, 0.5) == 4
    assert exchange.delay(1.49 / 4, 8e6, 0.5) is None


def test_the_answer_is_hidden_and_of_the_lowest_loss(at_this_link):
    hidden = by_setting(at_this_link[7])
    over = {setting.name: setting.over for setting in MAP}
    for answer, workers in zip(at_this_link[9:], WORKERS[:2], strict=False):
        assert answer.startswith(f"{workers} workers: ")
        setting_line, line = answer.splitlines()
        named = [setting for setting in MAP if f" {setting.words} (" in setting_line]
        assert len(named) == 1
        (setting,) = named
        delay = hidden[setting.name, workers]["hidden with"]
        for name in over:
            if hidden[name, workers]["hidden with"] != "nothing" and workers in over[name]:
                assert over[setting.name][workers] <= over[name][workers]
        assert f"({over[setting.name][workers]:+.1f} %)" in setting_line
        assert shlex.split(line) == [*setting.overrides(compose(TINY).config), delay]
        assert new_optimizer(setting, delay).sync_delay == int(delay.partition("=")[2])


def test_for_workers_that_have_not_run_the_next_fewer_are_named(known_exchanges, monkeypatch):
    monkeypatch.setattr("training.study.loss_gaps", lambda: {"local10-signs": 1.19})
    answer = planned("plan.step_seconds=10", "plan.mbit=100")[-1]
    assert answer.startswith(
        "8 workers: signs of all entries, every 10 steps (+1.2 % with 2 workers, not run with "
        "8):\noptimizer=local_signs "
    )


def test_without_the_studys_summary_one_line_says_so(tmp_path, monkeypatch, at_this_link):
    monkeypatch.setattr("training.overlap.SUMMARY", tmp_path / "summary.json")
    *plan_alone, note = planned(*LINK)
    assert plan_alone == at_this_link[: len(plan_alone)]
    assert "results/shakespeare/summary.json is missing" in note and "\n" not in note


@pytest.mark.usefixtures("known_exchanges")
def test_nothing_is_hidden_behind_steps_that_are_too_short():
    *_, answer = planned("plan.step_seconds=1e-300", "plan.mbit=1e-20")
    assert answer == "8 workers: none, the steps are too short for this link"


def test_a_plan_changes_neither_a_runs_name_nor_what_it_goes_on_with():
    with_plan, without = compose((*TINY, *LINK)), compose(TINY)
    assert with_plan.name(2) == without.name(2)
    matters = [what_matters(OmegaConf.to_container(job.config)) for job in (with_plan, without)]
    assert matters[0] == matters[1]
