"""Replays are what they say, and the probes' page is that of their records."""

import json
from statistics import mean

import numpy as np
import pytest
import torch
from pictures import drawn_as_committed
from run import ROOT
from study_page import end, logs

from data.loader import WorkerBatches
from ef21_muon.compressors import Identity, QuantizedRank, TopK
from model import GPT
from scripts.probes import run as probes
from scripts.probes.replay import LAYERS, orthogonalised, replay, worker_gradients
from training.config import build, compose
from training.data import open_data

RESULTS = ROOT / "results" / "probes"
PAGE = (RESULTS / "README.md").read_text()
TEXT = " ".join(PAGE.split())


def records(name):
    every = map(json.loads, (RESULTS / "probes.jsonl").open())
    return [record for record in every if record["probe"] == name]


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


def test_what_is_measured_is_kept_and_drawn(tmp_path, monkeypatch):
    kinds = {"one": lambda: iter([{"a": 1}]), "other": lambda: iter([{"b": 2}, {"b": 3}])}
    monkeypatch.setattr(probes, "PROBES", kinds)
    monkeypatch.setattr(probes, "draw", lambda records, folder: str(len(records)))
    assert probes.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "probes.jsonl").read_text().splitlines() == [
        '{"probe": "one", "a": 1}',
        '{"probe": "other", "b": 2}',
        '{"probe": "other", "b": 3}',
    ]


def test_the_committed_page_and_figures_are_up_to_date(tmp_path, drawn):
    (tmp_path / "probes.jsonl").symlink_to(RESULTS / "probes.jsonl")
    assert probes.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == PAGE
    assert drawn.keys() == {"why", "differences"}
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
