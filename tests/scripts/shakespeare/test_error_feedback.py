"""The sections on feedback of steps and on signs, from logs, and what explains the second."""

import json
from statistics import mean

import numpy as np
import pytest
import torch
from logs import write_study_log

from scripts.shakespeare import run as study
from scripts.shakespeare.muon_feedback import best, feedback_text, muon_feedback
from scripts.shakespeare.results import read_settings
from scripts.shakespeare.settings import FEEDBACK_SETTINGS, SIGN_SETTINGS
from scripts.shakespeare.sign_replay import RULES, replay
from scripts.shakespeare.signs import signs_section, signs_text

PAGE = (study.RESULTS.parent / "README.md").read_text()


def final(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [one for one in records if one["record"] == "eval"][-1]["test_loss"]


@pytest.mark.parametrize(
    ("heading", "folder"),
    [
        ("Muon with error feedback of its steps", "muon_feedback"),
        ("Signs before and after the LMO", "signs"),
    ],
)
def test_a_section_is_there_with_its_logs_and_has_their_losses(heading, folder):
    logs = sorted(study.RESULTS.glob(f"{folder}/*.jsonl"))
    assert (f"## {heading}\n" in PAGE) == bool(logs)
    if logs:
        section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
        for name in {path.name.rpartition("-seed")[0] for path in logs}:
            seeds = [final(path) for path in logs if path.name.startswith(f"{name}-seed")]
            assert f"| {mean(seeds):.4f}" in section


def write(directory, losses):
    for name, of_seeds in losses.items():
        for seed, loss in enumerate(of_seeds):
            write_study_log(directory / f"{name}-seed{seed}.jsonl", [3.0, loss])


def test_the_best_radius_is_that_of_seed_0_and_is_judged_by_its_seeds(tmp_path):
    radii = {15: [1.9], 60: [1.7], 250: [1.8], 1000: [1.65, 1.55, 1.75]}
    losses = {f"muon_feedback/with-radius{radius}": seeds for radius, seeds in radii.items()}
    write(tmp_path, {"muon_feedback/without": [1.5, 1.6, 1.7]})
    assert feedback_text(read_settings(tmp_path, FEEDBACK_SETTINGS)) == ""
    write(tmp_path, losses)
    found = read_settings(tmp_path, FEEDBACK_SETTINGS)
    assert best(found).setting.name == "muon_feedback/with-radius1000"
    section = " ".join(muon_feedback(found).split())
    gap = 100 * ((1.65 + 1.55 + 1.75) / (1.5 + 1.6 + 1.7) - 1)
    assert (
        "radius, 1000 (an end of the grid), Muon with feedback has a final loss "
        f"{gap:+.1f} % from Muon's" in section
    )
    assert "a higher one with 2 of 3 seeds: the claim does not hold here." in section
    assert f"| with feedback | 15 | 1 | 1.9000 | {100 * (1.9 / 1.5 - 1):+.1f} % |" in section


def test_signs_stand_beside_the_work_whose_claim_it_is(tmp_path):
    write(tmp_path, {"muon_feedback/without": [1.5]})
    muon = read_settings(tmp_path, FEEDBACK_SETTINGS)["muon_feedback/without"]
    assert signs_section({}, muon, []) == ""
    ends = {"before-ef21": 1.8, "before-none": 1.6, "after-ef21": 1.7, "after-none": 1.65}
    write(tmp_path, {f"signs/{rule}": [loss] for rule, loss in ends.items()})
    found = read_settings(tmp_path, SIGN_SETTINGS)
    sentence = signs_text(found)
    assert (
        "before the LMO the final loss with EF21 is +12.5 % from that without feedback, as there "
        "(+0.7 %)" in sentence
    )
    assert (
        "after the LMO the final loss with EF21 is +3.0 % from that without feedback, unlike there "
        "(-0.1 %)" in sentence
    )
    section = signs_section(found, muon, [])
    row = "| before the LMO | EF21 | 1.8000 | +20.0 % | EF21-MuonUSign | 3.3203 | +1.3 % |"
    assert row in section
    assert signs_section(found, None, []) == ""
    numbers = dict(
        zip(("error", "turn", "alignment", "descent"), (0.11, 0.22, 0.33, 0.44), strict=True)
    )
    replayed = [{"rule": rule, "beta": beta, **numbers} for rule in RULES for beta in (0.2, 0.05)]
    section = signs_section(found, muon, replayed)
    assert f"{row} 0.11 | 0.22 | 0.33 | 0.44 |" in section
    assert "M turns by 0.22 of its own length" in " ".join(section.split())


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "muon"])
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
    found = replay([torch.from_numpy(one).float() for one in gradients], rule, beta)
    names = ("error", "turn", "alignment", "descent")
    expected = dict(zip(names, np.mean(measured, 0), strict=True))
    assert found == pytest.approx(expected, rel=1e-3)


def test_muon_is_replayed_as_it_is():
    gradients = [torch.randn(4, 6) for _ in range(10)]
    found = replay(gradients, "muon", 1.0)
    assert (found["error"], found["alignment"]) == (0, pytest.approx(1))
