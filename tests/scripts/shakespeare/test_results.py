"""What the study's logs say: where a target is reached, what is saved, who is ahead."""

import re
from itertools import pairwise
from statistics import mean

import numpy as np
import pytest
from hydra.utils import instantiate
from logs import study_records, write_study
from study_page import logs, seeds_of

from scripts.shakespeare.results import (
    BOTH,
    METHODS,
    OTHERS,
    SENT,
    ahead,
    at_their_rate,
    envelope,
    envelopes,
    of_method,
    reach,
    read,
)


@pytest.fixture(scope="module")
def results():
    return read()


def read_these(directory, **runs):
    """What is read of logs of these runs, by their names with _ for -."""
    named = {name.replace("_", "-"): records for name, records in runs.items()}
    return read(write_study(directory, named))


@pytest.mark.parametrize("target", [2.9, 2.5, 2.0, 1.5, 1.0])
def test_the_target_is_reached_where_numpy_says(tmp_path, target):
    """The loss rises once between 2.0 and 2.1."""
    found = read_these(tmp_path, identity_seed0=study_records([3.0, 2.8, 2.0, 2.1, 1.0]))
    (log,) = found["identity"].logs
    if target >= 2.0:
        step = np.interp(-target, [-3.0, -2.8, -2.0], [10, 20, 30])
    else:
        step = np.interp(-target, [-2.1, -1.0], [40, 50])
    for key, of_step in (("tokens", 5), (SENT, 40), (BOTH, 120)):
        assert reach(log, target, key) == pytest.approx(of_step * step)


def test_a_target_below_all_losses_is_not_reached(tmp_path):
    (log,) = read_these(tmp_path, identity_seed0=study_records([3.0, 2.0]))["identity"].logs
    assert reach(log, 1.9, SENT) is None
    assert [reach(log, 3.5, key) for key in ("tokens", SENT, BOTH)] == [50, 400, 1200]


def test_the_target_is_the_uncompressed_loss_at_three_quarters(tmp_path):
    found = read_these(
        tmp_path,
        identity_seed0=study_records([4.0, 3.0, 2.5, 2.0]),
        identity_seed1=study_records([4.0, 3.0, 2.7, 1.9]),
        rank5_seed0=study_records([4.0, 3.0, 2.9, 2.1]),
    )
    assert found["identity"].target == found["rank5"].target == pytest.approx(2.6)
    assert found["rank5"].gap == pytest.approx(100 * (2.1 / 1.95 - 1))


def test_a_run_without_what_it_is_compared_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks identity, with which rank5 is compared: run scri"):
        read_these(tmp_path, rank5_seed0=study_records([3.0]))


def test_savings_from_the_logs_alone(results):
    def sent_until(evals, target):
        for before, after in pairwise(evals):
            losses = after["test_loss"], before["test_loss"]
            if losses[0] <= target < losses[1]:
                return np.interp(target, losses, [after["w2s_bytes"], before["w2s_bytes"]])
        return None

    whole = [logs()[name][1] for name in seeds_of("identity")]
    target = mean(next(r["test_loss"] for r in evals if r["step"] == 450) for evals in whole)
    base, reached = mean(sent_until(evals, target) for evals in whole), 0
    for name in (name for name in results if "/" not in name):
        sent = [sent_until(logs()[run][1], target) for run in seeds_of(name)]
        times = results[name].times_to_target(SENT)
        assert times == (None if None in sent else pytest.approx(base / mean(sent)))
        reached += times is not None
    assert reached > 40


def test_rivals_are_met_at_their_rate(tmp_path):
    """Ours may send a hundredth more, not a tenth, and of what remains the lowest loss counts."""
    runs = {
        "identity_seed0": study_records([3.0, 1.0], bytes_a_step=800),
        "demo32_seed0": study_records([3.0, 2.0], bytes_a_step=100),
        "rank5_seed0": study_records([3.0, 1.9], bytes_a_step=50),
        "rank10_seed0": study_records([3.0, 1.8], bytes_a_step=101),
        "rank15_seed0": study_records([3.0, 1.5], bytes_a_step=110),
    }
    ((other, best),) = at_their_rate(read_these(tmp_path, **runs))
    assert (other.setting.name, best.setting.name) == ("demo32", "rank10")


def test_labels_tell_what_was_sent(results):
    """A message that would save no byte gives way to all entries, which logs do not tell."""
    gave_way = 0
    for one in results.values():
        config = one.run["config"]
        if one.setting.family == "grid" or "ef21_muon." not in config["optimizer"]["_target_"]:
            continue
        asked, width = instantiate(config["w2s"]), config["model"]["width"]
        shapes = ((256, width), (width, width), (4 * width, width), (width, 4 * width))
        sent = {str(asked.fit(*shape)) for shape in shapes}
        name = str(asked) if str(asked) in sent else sent.pop()
        pattern = rf"(^|, )(\w+ )?{re.escape(name)}(,|$)"  # of all, or of a role
        assert re.search(pattern, one.label), (name, one.label)
        gave_way += name != str(asked)
    assert gave_way >= 10


LINES = [
    [(1.0, 3.0), (4.0, 2.0), (16.0, 1.5)],
    [(2.0, 2.2), (8.0, 2.1)],  # ahead at first, and ends early
    [(3.0, 2.9), (32.0, 1.6)],  # never ahead
]


def lowest(x):
    """At x, with at most as many bytes: losses of LINES fall, and last when a line has ended."""
    return min(
        np.interp(np.log(x), np.log([size for size, _ in line]), [loss for _, loss in line])
        for line in LINES
        if line[0][0] <= x
    )


def test_an_envelope_is_the_best_of_all_lines_at_their_points():
    found = dict(envelope(LINES))
    assert found[1.0] == 3.0 and found[2.0] == 2.2 and found[16.0] == 1.5
    assert found[4.0] == 2.0 and 32.0 not in found
    for x, loss in found.items():
        assert loss == pytest.approx(lowest(x))
    xs, losses = np.array(envelope(LINES)).T
    assert (np.diff(xs) > 0).all() and (np.diff(losses) <= 0).all() and losses[-1] == 1.5


def test_every_method_of_the_picture_reaches_the_best_loss_of_its_runs(results):
    found = envelopes(results)
    assert len(METHODS) == len(found) == 11
    assert {family for families in METHODS.values() for family in families} == {"identity", *OTHERS}
    for method, line in found.items():
        runs = [one.by_both for one in of_method(results, method)]
        assert line[-1][1] == min(loss for run in runs for _, loss in run)
    assert {name for name, *_ in ahead(results)} <= {name.replace("\n", " ") for name in METHODS}
