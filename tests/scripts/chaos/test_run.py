"""scripts/chaos: a short one, with real processes; and what the committed one says."""

import json
import statistics
from argparse import Namespace

import pytest
from run import ROOT

from scripts.chaos import run
from scripts.chaos.run import FAULTS, LOG, OPTIONS, bound, details, draw, report
from scripts.faults import draws
from scripts.studies import command, read_records
from training.fleet import FACTOR, MARGIN

COMMITTED = ROOT / "results" / "chaos"


@pytest.fixture
def chaos(tmp_path, small, forks, monkeypatch):
    """Records of a run with these options, of rounds of four steps; its workers are forks."""
    monkeypatch.setattr(run, "EVERY", 4)

    def chaos(*options) -> list[dict]:
        data = [override for override in small if override.startswith("data.")]
        own = [*data, "eval.tokens=320", "eval.every=100", "checkpoint.every=100"]
        own += [f"optimizer.sync_every={run.EVERY}"]
        # Losses of few steps differ, which is an error.
        command(run.__doc__, LOG, run.chaos, draw, OPTIONS, [f"--out={tmp_path}", *options, *own])
        records = read_records(tmp_path / "chaos.jsonl")
        assert records[-1]["record"] == "end"
        return records

    return chaos


def test_the_run_goes_on_with_one_w(chaos):
    """A fault early, the other soon after it, by their seed."""
    options = ["--faults=2", "--kinds=kill,part", "--seed=197", "--workers=3", "--calm=1"]
    records = chaos(*options, "--steps=64", "--pace=0.1", "batch.global_size=3")
    faults, rounds = ([r for r in records if r["record"] == kind] for kind in ("fault", "round"))
    assert {one["kind"] for one in faults} == {"kill", "part"}
    assert all(one["longest_wait"] <= one["promised"] for one in faults)
    for one in rounds:
        assert one["equal_at_the_end"] and one["rounds_with_two_histories"] == 0
    assert sum(one["had_another_history"] for one in rounds) == 1
    calm, tokens = next(one for one in records if one["record"] == "calm"), rounds[0]["tokens"]
    of_a_step = 3 * 32
    assert calm["steps"] * of_a_step == pytest.approx(tokens, abs=of_a_step * run.EVERY / 2)
    # In runs of so few steps one that starts a little later than the majority misses many of them.
    assert 2 / 3 <= calm["tokens"] / (calm["steps"] * of_a_step) <= 1


@pytest.mark.slow
def test_all_kinds_of_faults(chaos):
    options = ["--faults=7", "--workers=4", "--steps=2500", "--pace=0.05"]
    records = chaos(*options)
    faults, rounds = ([r for r in records if r["record"] == kind] for kind in ("fault", "round"))
    assert {one["kind"] for one in faults} == set(FAULTS)
    assert all(one["longest_wait"] <= one["promised"] for one in faults)
    assert all(one["equal_at_the_end"] for one in rounds)


def test_every_kind_comes_as_often_as_any_other():
    given = Namespace(faults=3 * len(FAULTS), kinds=",".join(FAULTS), seed=1)
    drawn, again = (draws(given, lambda generator: details(generator, 4)) for _ in range(2))
    kinds = [one["kind"] for one in drawn]
    assert all(kinds.count(kind) == 3 for kind in FAULTS)
    assert drawn == again
    assert {one["worker"] for one in drawn} == {0, 1, 2, 3}


def test_what_is_promised():
    assert bound("kill", 12.0, 0.1) == 20
    assert bound("lighthouse", 12.0, 0.1) == 32
    assert bound("hang", 12.0, 0.1) == MARGIN + FACTOR * 0.1 + 20


def test_the_committed_run_holds_what_its_report_says():
    records = [json.loads(line) for line in (COMMITTED / "chaos.jsonl").read_text().splitlines()]
    text, holds = report(records)
    assert (COMMITTED / "README.md").read_text() == text
    faults = [one for one in records if one["record"] == "fault"]
    rounds = [one for one in records if one["record"] == "round"]
    calm = [one for one in records if one["record"] == "calm"]
    assert records[0]["workers"] == 4 and len(faults) >= 60
    assert len({one["kind"] for one in faults}) == len(FAULTS)
    assert sum(one["seconds"] for one in rounds) >= 30 * 60
    still: dict[tuple, float] = {}  # seconds of a worker's longest step, by round and worker
    for one in faults:
        which = one["round"], one["worker"]
        if one["kind"] == "stop":
            still[which] = max(still.get(which, 0.0), one["lasts"])
        usual = {"hang": 30 + 5 * (still.get(which, 0.0) + 0.1), "lighthouse": one["lasts"]}
        assert one["longest_wait"] <= usual.get(one["kind"], 0.0) + 20
    for one in rounds:
        assert one["rounds_with_two_histories"] == 0 and one["equal_at_the_end"]
    assert len(calm) == len(rounds)
    losses, without = ([one["test_loss"] for one in some] for some in (rounds, calm))
    assert holds == (min(without) <= statistics.mean(losses) <= max(without))


def test_a_fault_that_held_others_up_for_too_long_fails():
    records = [
        {"record": "start", "seed": 0, "workers": 3, "pace": 0.1, "steps": 10},
        fault := {"record": "fault", "kind": "kill", "longest_wait": 5.0, "round": 0, "worker": 1}
        | {"back_after_seconds": 9.0, "lasts": 1.0},
        round_ := {"record": "round", "seed": 0, "seconds": 60.0, "rounds_seen": 3, "tokens": 9}
        | {"rounds_with_two_histories": 0, "equal_at_the_end": True, "test_loss": 2.0},
        {"record": "calm", "seed": 0, "steps": 9, "tokens": 9, "test_loss": 2.0},
    ]
    assert report(records)[1]
    for one, key, value in (
        (fault, "longest_wait", 21.0),
        (round_, "rounds_with_two_histories", 1),
        (round_, "equal_at_the_end", False),
        (round_, "test_loss", 2.1),
    ):
        broken = [record | {key: value} if record is one else record for record in records]
        assert not report(broken)[1]
