"""Workers that come and go, in a run: what hangs, what is logged, and what a restart finds."""

import inspect
import json
import os
import signal
from collections import deque
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from run import launch, script

from ef21_muon.transport.fixed import Traffic
from scripts.chaos.crew import Crew
from scripts.fleet import worker_overrides
from training.checkpoint import Checkpoints
from training.config import compose
from training.fleet import (
    FixedMembership,
    FleetMembership,
    QuorumRecords,
    new_membership,
    place_among_all,
)
from training.log import NoLog, RunLog
from training.resume import position_left, resume
from training.workers import FINAL, FinalError, RunError, Workers

HANGS = """
import sys, time
from training import fleet
fleet.MARGIN = 0.5
watch = fleet.Watchdog(0.5)
with watch("step"):
    time.sleep(0.01)
for _ in range(2):  # it is in time, and waits for good reason
    with watch("step"):
        watch.extend(1.0)
        time.sleep(0.7)
        watch.extend(0)
print("in time", flush=True)
{}
time.sleep({})
print("not ended", flush=True)
"""


@pytest.mark.parametrize("place", ["pass", "watch.stop()", "watch('step').__enter__()"])
def test_what_hangs_ends_and_says_where(tmp_path, place):
    stops = place == "watch.stop()"
    (tmp_path / "hangs.py").write_text(HANGS.format(place, 1.5 if stops else 60))
    if stops:
        assert script(tmp_path / "hangs.py").stdout == "in time\nnot ended\n"
        return
    result = script(tmp_path / "hangs.py", expect=1)
    assert result.stdout == "in time\n"
    assert "Timeout" in result.stderr and 'hangs.py"' in result.stderr


def quorum(workers, **changes):
    verdict = pytest.importorskip("ef21_muon.fleet.verdict", exc_type=ImportError)
    usual = {"messages": len(workers), "step": 30, "healed": False, "diverged": 0, "history": "00"}
    usual |= {"tries": 1, "seconds": 0.01234, "traffic": Traffic()}
    return verdict.Quorum(**usual | {"workers": workers} | changes)


def test_the_log_says_who_met_and_why_others_than_before():
    fleet, told, seen = SimpleNamespace(quorums=deque()), QuorumRecords(), []
    for one in (
        quorum((0, 1, 2)),
        quorum((0, 1, 2)),
        quorum((0, 2), tries=2),
        quorum((0, 1, 2), messages=2, healed=True, diverged=1),
        quorum((0, 1), step=None, messages=0),
        quorum((0, 1), messages=1, refused=(1,), notes=("worker 1's message is not finite",)),
    ):
        fleet.quorums.append(one)
        seen += told.records(fleet)
    assert [one["why"] for one in seen] == [
        [],
        [],
        ["worker 1 is gone"],
        ["worker 1 came", "had another history", "took over the others' state"],
        ["worker 2 is gone"],
        ["worker 1's message is not finite"],
    ]
    assert [one["step"] for one in seen] == [30, 30, 30, 30, None, 30]
    assert seen[2] == {
        "step": 30,
        "workers": [0, 2],
        "messages": 2,
        "why": ["worker 1 is gone"],
        "tries": 2,
        "seconds": 0.012,
        "state": "00",
    }
    assert list(told.records(fleet)) == []


def fleet_config(worker: int, *overrides: str):
    own = ["membership=torchft", "membership.workers=3", f"membership.worker={worker}"]
    return compose((*own, "optimizer=local", *overrides)).config


def test_every_rank_of_every_worker_has_a_part_of_its_own():
    class OfTwo(Workers):
        def __init__(self, rank):
            self.rank, self.count = rank, 2

    places = [place_among_all(fleet_config(w), OfTwo(rank)) for w in range(3) for rank in (0, 1)]
    assert places == [(place, 6) for place in range(6)]
    assert place_among_all(compose(()).config, OfTwo(1)) == (1, 2)


@pytest.mark.parametrize(("whole", "null"), [(FleetMembership, FixedMembership), (RunLog, NoLog)])
def test_what_does_nothing_is_called_as_what_does_it(whole, null):
    def calls(kind):
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: [*inspect.signature(method).parameters]
            for name, method in methods
            if not name.startswith("_")
        }

    assert calls(null) == calls(whole) and calls(null)


def test_membership_decides_who_the_members_are():
    assert isinstance(new_membership(compose(()).config, Workers()), FixedMembership)
    fleet = new_membership(fleet_config(0), Workers())
    assert isinstance(fleet, FleetMembership) and fleet.stop_check_interval(None) == 1


def test_who_is_refused_ends_for_good_and_has_logged_the_rounds_before():
    members, logged = FleetMembership(fleet_config(1), Workers()), []
    refused = pytest.importorskip("ef21_muon.fleet", exc_type=ImportError).FleetRefused
    members.fleet = SimpleNamespace(quorums=deque([quorum((0, 1))]))
    log = SimpleNamespace(membership=logged.append)
    with (
        pytest.raises(FinalError, match="worker 1 cannot continue: its number is taken"),
        members.end_if_refused(log),
    ):
        raise refused("its number\nis taken")
    assert [one["workers"] for one in logged] == [[0, 1]]


def test_a_log_without_a_checkpoint_is_gone_on_with(tmp_path):
    config = fleet_config(0)
    assert position_left(config, tmp_path) is None
    run = {"record": "run", "config": OmegaConf.to_container(config, resolve=True)}
    train = {"record": "train", "step": 40, "tokens": 99, "seconds": 1.5}
    met = {"record": "membership", "step": 60, "workers": [0]}
    whole = "".join(json.dumps(one) + "\n" for one in (run, train, met))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"record": "tra')
    found = position_left(fleet_config(1), tmp_path)  # which worker it is, makes no difference
    assert found == {"log_bytes": len(whole), "step": 40, "position": train}
    with pytest.raises(RunError, match="made with another configuration: seed=1"):
        position_left(fleet_config(0, "seed=1"), tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"record": "ru')
    assert position_left(config, tmp_path) is None


RUN = {"record": "run", "config": OmegaConf.to_container(fleet_config(0), resolve=True)}
FAILED = {"record": "end", "status": "failed", "error": "worker 0 cannot continue"}
MET = {"record": "membership", "workers": [0, 1]}
NOTHING_DONE = {
    "refused by the others": [RUN, FAILED],
    "killed before its first step": [RUN],
    "killed in a first record": [RUN, '{"record": "trai'],
    "refused after a meeting at the start": [RUN, MET | {"step": 0}, MET | {"step": None}, FAILED],
    "asked to stop before its first step": [RUN, {"record": "end", "status": "stopped", "step": 0}],
}


@pytest.mark.parametrize("records", NOTHING_DONE.values(), ids=NOTHING_DONE)
@pytest.mark.parametrize("membership", ["torchft", "fixed"])
def test_after_a_start_that_trained_nothing_another_configuration_starts(
    records, membership, tmp_path
):
    lines = [one if isinstance(one, str) else json.dumps(one) + "\n" for one in records]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    seed = "seed=1"  # another than the log's
    config = fleet_config(0, seed) if membership == "torchft" else compose((seed,)).config
    config.resume = "auto"
    workers = Workers(alone=True)
    run = SimpleNamespace(config=config, workers=workers)
    assert resume(run, Checkpoints(tmp_path / "checkpoints", workers, keep=1), tmp_path) is None


@pytest.mark.parametrize(
    "record", [{"record": "train", "step": 1, "tokens": 9, "seconds": 1.0}, MET | {"step": 30}]
)
def test_after_a_step_another_configuration_is_refused(record, tmp_path):
    lines = [json.dumps(one) + "\n" for one in (RUN, record, FAILED)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    with pytest.raises(RunError, match="made with another configuration: seed=1"):
        position_left(fleet_config(0, "seed=1"), tmp_path)


@pytest.mark.slow
def test_a_worker_of_two_ranks_is_gone_as_a_whole_and_comes_back(small, tmp_path):
    own = [one for one in small if not one.startswith(("steps", "batch.global_size"))]
    told = ["optimizer=local", "optimizer.sync_every=5", "steps=800", "batch.global_size=6"]
    overrides = [*own, *told, "eval.every=800", "checkpoint.every=200"]
    with Crew(3, tmp_path / "run", overrides, 0.05, ranks=2) as crew:
        assert crew.wait_until_all_meet(20)
        os.kill(crew.children(1)[1], signal.SIGKILL)
        assert crew.wait_until_all_meet(crew.last_step() + 60)
        crew.wait_until_all_end()
        ends = [crew.records(worker)[-1] for worker in range(3)]
        assert len({one["state"] for one in ends}) == 1 and ends[0]["step"] == 800
        met = [one for one in crew.records(0) if one["record"] == "membership"]
        assert [0, 2] in [one["workers"] for one in met]
        told = [one["why"] for one in crew.records(1) if one["record"] == "membership"]
        assert ["took over the others' state"] in told


@pytest.mark.slow
def test_who_does_not_belong_to_a_run_ends_at_its_start_and_the_run_goes_on(small, tmp_path):
    own = [one for one in small if not one.startswith(("steps", "batch.global_size"))]
    told = ["optimizer=local", "optimizer.sync_every=5", "steps=800", "batch.global_size=6"]
    overrides = [*own, *told, "eval.every=800", "checkpoint.every=0"]
    with Crew(2, tmp_path / "run", overrides, 0.05) as crew:
        assert crew.wait_until_all_meet(20)
        for change, reason in (
            ([], "error: worker 0 cannot continue: there is worker 0 on localhost (process "),
            (["optimizer.inner.lr=0.03"], ": optimizer.inner.lr=0.03 (theirs 0.02)"),
        ):
            given = worker_overrides(crew.options, 0)
            given[-1] = f"directory={tmp_path}/other{len(change)}"
            assert reason in launch(0, *given, *change, expect=FINAL).stderr
            assert crew.wait_until_all_meet(crew.last_step() + 5)
        crew.wait_until_all_end()
        ends = [crew.records(worker)[-1] for worker in range(2)]
        assert len({one["state"] for one in ends}) == 1 and ends[0]["step"] == 800
        met = [one for one in crew.records(0) if one["record"] == "membership"]
        assert sum(one["tries"] - 1 for one in met) == 2
