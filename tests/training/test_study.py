"""The map of training/study.py against the study's runs, and its summary against the logs."""

import json

import pytest
from study_page import gap, seeds_of

from scripts.shakespeare.runs import SETTINGS
from training.config import compose
from training.study import MAP, SUMMARY, WORKERS

FOR_EIGHT = ("-back", "-back6", "-outer6")


def names_in_study(name):
    """By workers; 2 bits were what every local step had at first."""
    others = {workers: f"workers/{workers}-{name}" for workers in WORKERS}
    return {**others, 2: name.removesuffix("-dense2")}


def plain(name):
    """What a setting is compared with."""
    folder, _, rest = name.rpartition("/")
    if folder in ("muon_feedback", "signs"):
        return "muon_feedback/without"
    if folder == "momentum":
        return f"momentum/polyak-{rest.rpartition('-')[2]}"
    return next(
        (
            one
            for one in SETTINGS
            if folder and one.endswith("-identity") and name.startswith(one[:-8])
        ),
        "identity",
    )


def test_the_summary_is_what_the_logs_say():
    gaps = json.loads(SUMMARY.read_text())["loss_gap_percent"]
    done = [name for name in SETTINGS if seeds_of(name) and not name.startswith("grid/")]
    assert gaps == {name: round(gap(name, plain(name)), 3) for name in done}


def test_the_map_has_the_losses_of_the_logs():
    for one in MAP:
        found = {
            workers: name for workers, name in names_in_study(one.name).items() if seeds_of(name)
        }
        of_workers = {2: "identity", 4: "workers/4-identity", 8: "workers/8-identity"}
        assert one.over == {n: round(gap(name, of_workers[n]), 3) for n, name in found.items()}


def test_two_workers_have_run_all_but_what_helps_eight():
    for one in MAP:
        assert one.over.keys() == {8} if one.name.endswith(FOR_EIGHT) else 2 in one.over


OF_600_STEPS = compose(("experiment=shakespeare",)).config


@pytest.mark.parametrize("setting", MAP, ids=lambda one: one.name)
def test_overrides_are_those_of_the_study(setting):
    names = [name for name in names_in_study(setting.name).values() if name in SETTINGS]
    of_study = {SETTINGS[name].overrides for name in names}
    (overrides,) = of_study  # for every number of workers
    mine = compose(setting.overrides(OF_600_STEPS)).config
    assert compose(tuple(overrides.split())).config == mine


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
