"""The map of training/study.py against the study's settings and logs."""

import json
from statistics import mean

import pytest
from run import ROOT

from scripts.shakespeare.conditions import WORKER_SETTINGS
from scripts.shakespeare.settings import SETTINGS
from training.config import compose
from training.study import MAP, OVER, WORKERS

LOGS = ROOT / "results" / "shakespeare"
FOR_EIGHT = ("-back", "-back6", "-outer6")


def name_in_study(name, workers):
    """The name of its logs and of its setting; 2 bits were what every local step had at first."""
    return name.removesuffix("-dense2") if workers == 2 else f"workers/{workers}-{name}"


def last_loss(path):
    evals = [record for record in map(json.loads, path.open()) if record["record"] == "eval"]
    return evals[-1]["test_loss"]


def loss(name, workers):
    """At the end, mean over seeds; None where no log is."""
    paths = sorted(LOGS.glob(f"{name_in_study(name, workers)}-seed?.jsonl"))
    return mean(map(last_loss, paths)) if paths else None


def over_uncompressed():
    found = {}
    for setting in MAP:
        found[setting.name] = {}
        for workers in WORKERS:
            end, uncompressed = loss(setting.name, workers), loss("identity", workers)
            if end is not None and uncompressed is not None:
                found[setting.name][workers] = round(100 * (end / uncompressed - 1), 3)
    return found


def test_losses_are_those_of_the_logs():
    found = over_uncompressed()
    rows = "".join(f'    "{name}": {over},\n' for name, over in found.items())
    assert found == OVER, (
        f"the logs say otherwise, in training/study.py should be\nOVER = {{\n{rows}}}"
    )


def test_two_workers_have_run_all_but_what_helps_eight():
    for one in MAP:
        assert one.over.keys() == {8} if one.name.endswith(FOR_EIGHT) else 2 in one.over


OF_600_STEPS = compose(("experiment=shakespeare",)).config


@pytest.mark.parametrize("setting", MAP, ids=lambda one: one.name)
def test_overrides_are_those_of_the_study(setting):
    of_study = {one.name: one.overrides for one in (*SETTINGS, *WORKER_SETTINGS)}
    names = [name_in_study(setting.name, workers) for workers in WORKERS]
    found = [compose(of_study[name]).config for name in names if name in of_study]
    mine = compose(setting.overrides(OF_600_STEPS)).config
    assert found and all(other == mine for other in found)


@pytest.mark.parametrize(
    ("steps", "schedule", "every"),
    [
        (600, "cooldown=0.4", "{0:120,360:60}"),
        (9500, "cooldown=0.4", "{0:120,5640:60}"),
        (200, "cooldown=0.4", "{0:120,120:60}"),
        (190, "cooldown=0.4", "60"),
        (1000, "cooldown=1.0", "60"),
        (1000, "shape=cosine", "60"),
    ],
)
def test_rounds_get_shorter_before_the_lr_falls(steps, schedule, every):
    config = compose((f"steps={steps}", f"schedule.{schedule}")).config
    (setting,) = (one for one in MAP if one.name == "local120-60-signs")
    assert f"optimizer.sync_every={every}" in setting.overrides(config)
