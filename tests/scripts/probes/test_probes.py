"""Replays are what they say, and the probes' page is that of their records."""

import json
import re
from collections import defaultdict
from statistics import mean

import numpy as np
import pytest
import torch
from pictures import drawn_as_committed
from run import ROOT
from study_page import end, first_table, logs, section, table_after

from data.loader import WorkerBatches
from ef21_muon.compressors import Identity, QuantizedRank, TopK
from model import GPT
from scripts.probes import run as probes
from scripts.probes import sign_replay
from scripts.probes.page import draw
from scripts.probes.replay import orthogonalised, replay
from scripts.probes.times import times
from scripts.probes.trainings import LAYERS, worker_gradients
from scripts.shakespeare.results import read
from training import picture
from training.config import build, compose
from training.data import open_data
from training.renamed import modern_label

RESULTS = ROOT / "results" / "probes"
PAGE = (RESULTS / "README.md").read_text()
TEXT = " ".join(PAGE.split())
LINKS = {"10mbit": 1, "100mbit": 2, "1gbit": 3}  # columns
FREE = "no limit, no delay"


def records(name):
    return list(map(json.loads, (RESULTS / f"{name}.jsonl").open()))


@pytest.fixture(scope="module")
def gradients():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(24, 8, generator=generator)
    return [mean + torch.randn(24, 8, generator=generator) for _ in range(40)]


def test_what_is_sent_whole_is_not_off(gradients):
    error, alignment = replay(gradients, Identity(), 0.2)
    assert error < 1e-6
    assert alignment == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", [TopK, QuantizedRank])
def test_the_less_is_sent_the_further_it_is_off(gradients, kind):
    measured = [replay(gradients, kind(fraction), 0.2) for fraction in (0.7, 0.4, 0.15)]
    errors, alignments = zip(*measured, strict=True)
    assert list(errors) == sorted(errors)
    assert list(alignments) == sorted(alignments, reverse=True)


def test_orthogonalised_has_singular_values_of_one():
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(9, 5)))
    assert singular == pytest.approx(torch.ones(5), abs=1e-5)


def test_the_first_workers_gradients_are_kept(small):
    """The first round's by hand: the model's first weights, and one worker's half of a batch."""
    overrides = ("compressor@w2s=identity", "model.layers=3", "batch.global_size=4")
    config = compose((*small, *overrides)).config
    gradients = worker_gradients(config, 2)
    assert sorted(gradients) == sorted(LAYERS)
    assert all(len(of_layer) == 2 for of_layer in gradients.values())
    model = GPT(build(config.model, "model"), config.seed)
    windows = WorkerBatches(open_data(config)[0], config.model.context, 0, 2, config.seed)
    model(*windows.next(2)).backward()
    for name, of_layer in gradients.items():
        assert torch.allclose(of_layer[0], model.get_parameter(name).grad, atol=1e-6)
    assert gradients["blocks.2.mlp.project.weight"][0].any()


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("rule", [rule for rule in sign_replay.RULES if rule != "muon"])
def test_a_replay_is_what_the_rules_say(rule):
    """20 rounds in float64, of which the 15th and the 20th are measured."""
    beta, gradients = 0.3, np.random.default_rng(0).normal(size=(20, 6, 10))
    place, feedback = rule.split("-")
    momentum, known, wanted = gradients[0], np.zeros((6, 10)), np.zeros((6, 10))
    measured = []
    for k, gradient in enumerate(gradients, 1):
        momentum = (1 - beta) * momentum + beta * gradient
        before, wanted = wanted, (momentum if place == "before" else -polar(momentum))
        to_send = wanted - known if feedback == "ef21" else wanted
        signs = np.abs(to_send).mean() * np.sign(to_send)
        known = known + signs if feedback == "ef21" else signs
        step = -polar(known) if place == "before" else known
        if k in (15, 20):
            muon = -polar(momentum)
            cosines = [
                np.sum(step * other) / np.linalg.norm(step) / np.linalg.norm(other)
                for other in (muon, -gradient)
            ]
            length = np.linalg.norm(wanted)
            errors = [np.linalg.norm(wanted - other) / length for other in (known, before)]
            measured.append([*errors, *cosines])
    found = sign_replay.replay([torch.from_numpy(one).float() for one in gradients], rule, beta)
    names = ("error", "turn", "alignment", "descent")
    expected = dict(zip(names, np.mean(measured, 0), strict=True))
    assert found == pytest.approx(expected, rel=1e-3)


def test_muon_is_replayed_as_it_is():
    found = sign_replay.replay([torch.randn(4, 6) for _ in range(10)], "muon", 1.0)
    assert (found["error"], found["alignment"]) == (0, pytest.approx(1))


def test_what_is_measured_is_kept_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "PROBES", tmp_path)
    monkeypatch.setattr(probes, "draw", lambda directory: [directory])
    monkeypatch.setitem(probes.MEASURED, "changes", lambda: iter([{"a": 1}, {"a": 2}]))
    assert probes.main(["--only", "changes"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["changes.jsonl"]
    assert (tmp_path / "changes.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


def test_the_committed_page_and_figures_are_up_to_date(tmp_path, monkeypatch):
    for path in RESULTS.glob("*.jsonl"):
        (tmp_path / path.name).symlink_to(path)
    drawn = {}
    monkeypatch.setattr(picture, "save", lambda one, path: drawn.update({path.name: one}) or [])
    draw(tmp_path)
    assert (tmp_path / "README.md").read_text() == PAGE
    assert drawn.keys() == {"why", "differences", "time"}
    for name, figure in drawn.items():
        assert drawn_as_committed(figure, RESULTS / f"{name}.svg")
        assert (RESULTS / f"{name}.png").exists()


def test_differences_are_reported_as_they_were_measured():
    found = records("differences")
    steps = sorted({one["every"] for one in found})
    assert steps[0] == 1 and len(steps) >= 4
    for every in steps:
        layers = [one for one in found if one["every"] == every]
        assert len({one["layer"] for one in layers}) == len(layers) == 25
        assert all(0 < one["stable_rank"] <= 1 and 0 < one["kept"] <= 1 for one in layers)
    hidden = [one for one in found if not one["layer"].startswith("embedding")]
    cosines = [mean(one["cosine"] for one in hidden if one["every"] == n) for n in (1, 30)]
    assert "from {:.2f} after a step to {:.2f} after 30".format(*cosines) in TEXT


def test_errors_of_replayed_compressors_go_with_their_losses():
    found = [one for one in records("replay") if f"{one['name']}-seed0" in logs()]
    ranks = [
        np.argsort(np.argsort(values))
        for values in zip(
            *((one["error"], one["alignment"], end(one["name"])) for one in found), strict=True
        )
    ]
    by_error, by_alignment = (np.corrcoef(one, ranks[2])[0, 1] for one in ranks[:2])
    assert f"sent by {len(found)} compressors" in TEXT
    assert f"rank correlation of {by_error:.2f}" in TEXT
    assert f"that of M one of {by_alignment:.2f}" in TEXT


def test_signs_are_in_the_order_of_their_losses():
    """Which the page says: the further down the newest gradient, the lower."""
    of = {one["rule"]: one for one in records("sign_replay") if one["beta"] == 0.2}
    rules = [rule for rule in of if rule != "muon"]
    assert sorted(rules, key=lambda rule: end(f"signs/{rule}")) == sorted(
        rules, key=lambda rule: -of[rule]["descent"]
    )
    _, rows = table_after("Signs before and after the LMO", PAGE)
    for one, row in zip(of.values(), rows, strict=False):
        assert row[-4:] == [f"{one[key]:.2f}" for key in sign_replay.MEASURED]


def test_time_to_the_target_is_steps_times_a_steps_time():
    measured = [{"rate": "100mbit", "name": "identity", "seconds": 2.0}]
    measured += [{"rate": "1gbit", "name": "other", "seconds": 9.0}]
    measured += [  # of which the median
        {"rate": "1gbit", "name": "identity", "seconds": seconds} for seconds in (0.5, 4.0, 0.1)
    ]
    results = read()
    steps = results["identity"].to_target("tokens") / 4096
    found = times(results, measured)
    assert {
        name: {link: one.seconds for link, one in of.items()} for name, of in found.items()
    } == {"identity": {"100mbit": pytest.approx(2 * steps), "1gbit": pytest.approx(steps / 2)}}


def test_a_slow_step_is_compared_with_the_next_of_its_setting_without_a_network():
    timed = [
        *(("10mbit", "muon", 3.0), ("1gbit", "muon", 9.0), ("10mbit", "muloco", 7.0)),
        *((FREE, "muon", 2.0), (FREE, "muloco", 7.0), (FREE, "muon", 8.0)),  # once more alone
        *(("10mbit", "muon", 5.0), (FREE, "muon", 4.0), ("10mbit", "muon", 6.0)),  # cut off
    ]
    keys = ("rate", "name", "seconds")
    found = times(read(), [dict(zip(keys, one, strict=True)) for one in timed])
    assert found["muon"]["10mbit"].over == [1.5, 1.25]
    assert found["muloco"]["10mbit"].over == [1.0]
    assert "100mbit" not in found["muon"]


def test_steps_over_a_slow_link_are_compared_within_a_repeat():
    seconds = defaultdict(list)
    for record in records("network"):
        seconds[record["name"], record["rate"]].append(record["seconds"])
    text = section("Time to the target", PAGE)
    listed = " ".join(text.split("|")[0].split()).rpartition("or more: ")[2]
    close = listed.removesuffix(".").split("; ")
    _, rows = first_table(text)
    compared = 0
    for (name, rate), over in seconds.items():
        if rate == FREE:
            continue
        label = modern_label(logs()[f"{name}-seed0"][0]["label"]).replace("top 30% sign", "sign")
        (row,) = (row for row in rows if row[0] == label)
        ratio, repeats = re.search(r"\(([\d.]+)x of (\d+)\)", row[LINKS[rate]]).groups()
        pairs = np.array(over) / np.array(seconds[name, FREE][: len(over)])
        assert int(repeats) == len(over)
        assert float(ratio) == round(float(np.median(pairs)), 2)
        if rate == "10mbit":
            assert (label in close) == (np.median(pairs) <= 1.05 and len(over) >= 3)
        compared += 1
    assert compared >= 30
