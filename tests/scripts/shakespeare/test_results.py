"""What the study's logs say: where a target is reached, what is saved, how long it takes."""

import json
import re
from itertools import pairwise
from statistics import mean

import numpy as np
import pytest
from hydra.utils import instantiate
from logs import write_study_log

from scripts.shakespeare import results as study_results
from scripts.shakespeare import run as study
from scripts.shakespeare.results import Point, reach, read
from scripts.shakespeare.runs import ALL_SETTINGS
from scripts.shakespeare.settings import SETTINGS, Setting


@pytest.mark.parametrize("target", [2.9, 2.5, 2.0, 1.5, 1.0])
def test_the_target_is_reached_where_numpy_says(tmp_path, target):
    """The loss rises once between 2.0 and 2.1."""
    log = study_results.read_log(write_study_log(tmp_path / "log.jsonl", [3.0, 2.8, 2.0, 2.1, 1.0]))
    if target >= 2.0:
        step = np.interp(-target, [-3.0, -2.8, -2.0], [10, 20, 30])
    else:
        step = np.interp(-target, [-2.1, -1.0], [40, 50])
    point = reach(log, target)
    assert (point.tokens, point.w2s, point.s2w) == pytest.approx((5 * step, 40 * step, 80 * step))


def test_a_target_below_all_losses_is_not_reached(tmp_path):
    log = study_results.read_log(write_study_log(tmp_path / "log.jsonl", [3.0, 2.0]))
    assert reach(log, 1.9) is None
    assert reach(log, 3.5) == Point(50, 400, 800, 1200)


def test_the_target_is_the_uncompressed_loss_at_three_quarters(tmp_path):
    for seed, losses in enumerate(([4.0, 3.0, 2.5, 2.0], [4.0, 3.0, 2.7, 1.9])):
        write_study_log(tmp_path / f"identity-seed{seed}.jsonl", losses)
    results = read(tmp_path, [Setting("identity", "identity", (), seeds=(0, 1))])
    assert study_results.target_loss(results["identity"]) == pytest.approx(2.6)


def test_savings_from_the_logs_alone():

    def evals(name, seed):
        lines = (study.RESULTS / f"{name}-seed{seed}.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if r["record"] == "eval"]

    def sent_until(records, target):
        for before, after in pairwise(records):
            losses = after["test_loss"], before["test_loss"]
            if losses[0] <= target < losses[1]:
                return np.interp(target, losses, [after["w2s_bytes"], before["w2s_bytes"]])
        raise AssertionError("never reached")

    results = read(study.RESULTS)
    seeds = next(s for s in SETTINGS if s.name == "identity").seeds
    whole = [evals("identity", seed) for seed in seeds[: len(results["identity"].logs)]]
    target = mean(next(r["test_loss"] for r in records if r["step"] == 450) for records in whole)
    saved = study_results.savings(results, target)
    base = mean(sent_until(records, target) for records in whole)
    for name, factor in saved.items():
        seeds = [s for s in range(3) if (study.RESULTS / f"{name}-seed{s}.jsonl").exists()]
        sent = mean(sent_until(evals(name, seed), target) for seed in seeds)
        assert factor == pytest.approx(base / sent)


def test_time_to_the_target_is_steps_times_a_steps_time(tmp_path):
    write_study_log(tmp_path / "identity-seed0.jsonl", [3.0, 2.0])
    results = read(tmp_path, [Setting("identity", "identity", ())])
    log = tmp_path / "network.jsonl"
    timed = [("100mbit", "identity", 2.0), ("1gbit", "other", 9.0)]
    timed += [("1gbit", "identity", seconds) for seconds in (0.5, 4.0, 0.1)]  # of which the median
    lines = [json.dumps(dict(zip(("rate", "name", "seconds"), one, strict=True))) for one in timed]
    log.write_text("\n".join(lines))
    found = study_results.times(results, 2.5, log)  # reached after 15 steps
    assert found == {"100mbit": {"identity": 30.0}, "1gbit": {"identity": 7.5}}


def test_a_slow_step_is_compared_with_the_next_of_its_setting_without_a_network(tmp_path):
    log, free = tmp_path / "network.jsonl", study_results.UNLIMITED
    timed = [
        *(("10mbit", "a", 3.0), ("1gbit", "a", 9.0), ("10mbit", "b", 7.0)),
        *((free, "a", 2.0), (free, "b", 7.0), (free, "a", 8.0)),  # 10mbit was not repeated
        *(("10mbit", "a", 5.0), (free, "a", 4.0), ("10mbit", "a", 6.0)),  # cut off
    ]
    lines = [json.dumps(dict(zip(("rate", "name", "seconds"), one, strict=True))) for one in timed]
    log.write_text("\n".join(lines))
    found = study_results.slowdowns(log)
    assert found["10mbit", "a"] == [1.5, 1.25]
    assert found["10mbit", "b"] == [1.0]
    assert ("100mbit", "a") not in found


def test_labels_tell_what_was_sent():
    """A message that would save no byte gives way to all entries, which logs do not tell."""
    settings = [one for one in ALL_SETTINGS if one.family != "grid"]
    gave_way = 0
    for result in study_results.read_settings(study.RESULTS, settings).values():
        config = result.logs[0].run["config"]
        if not config["optimizer"]["_target_"].startswith("ef21_muon."):
            continue
        asked, width = instantiate(config["w2s"]), config["model"]["width"]
        shapes = ((256, width), (width, width), (4 * width, width), (width, 4 * width))
        sent = {str(asked.fit(*shape)) for shape in shapes}
        name = str(asked) if str(asked) in sent else sent.pop()
        pattern = rf"(^|, )(\w+ )?{re.escape(name)}(,|$)"  # of all, or of a role
        assert re.search(pattern, result.label), (name, result.label)
        gave_way += name != str(asked)
    assert gave_way >= 10
