"""The study: its runs compose, its logs are what it asks for, and its figures are up to date."""

import json
from itertools import pairwise
from statistics import mean

import matplotlib.image
import numpy as np
import pytest
from omegaconf import OmegaConf

from scripts import study, study_figures, study_results
from scripts.figures import LOG_NAME
from scripts.study_findings import PLACE, TEXT, findings
from scripts.study_report import headline, report, rivals
from scripts.study_results import Point, reach, read, read_replay
from scripts.study_runs import RUNS, SETTINGS, Setting, StudyRun
from training.config import compose

FIRST = {"record": "run", "schema": 1, "label": "x", "parameters": 100}


def write_log(path, losses, bytes_a_step=40, **first):
    """A log with an evaluation every 10 steps of 5 tokens."""
    records = [FIRST | first]
    for place, loss in enumerate(losses, 1):
        step = 10 * place
        facts = {"step": step, "tokens": 5 * step, "w2s_bytes": bytes_a_step * step}
        facts |= {"s2w_bytes": 2 * bytes_a_step * step, "test_loss": loss}
        records += [{"record": "train", "step": step}, {"record": "eval", **facts}]
    records.append({"record": "end", "status": "completed"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_names_are_unique_and_every_run_composes():
    assert len({run.name for run in RUNS}) == len(RUNS)
    for run in RUNS:
        config = compose(study.overrides(run)).config
        assert config.steps == (300 if run.name.startswith("grid/") else 600)
        assert config.model.context * config.batch.sequences == 4096


def test_a_log_is_cut_not_edited(tmp_path):
    log = write_log(tmp_path / "log.jsonl", [3.0, 2.0]).read_text()
    kept = study.cut(log)
    assert kept.splitlines() == [line for line in log.splitlines() if '"train"' not in line]
    with pytest.raises(ValueError, match="start the study again to go on"):
        study.cut("\n".join(log.splitlines()[:-1]) + "\n")


def test_what_is_done_is_skipped_and_what_was_asked_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    run = StudyRun("one", ("seed=3",))
    assert not study.is_done(run)
    config = compose(("experiment=shakespeare", "seed=3")).config
    whole = OmegaConf.to_container(config, resolve=True)
    write_log(tmp_path / "one.jsonl", [3.0], config=whole)
    assert study.is_done(run)
    write_log(tmp_path / "one.jsonl", [3.0], config=whole | {"seed": 4})
    with pytest.raises(ValueError, match=r"one.jsonl: seed=3 \(the log has 4\); remove it"):
        study.is_done(run)
    del whole["seed"]  # a key that an earlier version did not have
    write_log(tmp_path / "one.jsonl", [3.0], config=whole)
    assert study.is_done(run)


def test_every_log_is_of_the_configuration_that_the_study_asks_for():
    for run in RUNS:
        study.is_done(run)
    logs = {path.relative_to(study.RESULTS).as_posix() for path in study.RESULTS.rglob("*.jsonl")}
    measured = {study_results.NETWORK_LOG, study_results.REPLAY_LOG}
    assert logs - measured <= {f"{run.name}.jsonl" for run in RUNS}


def test_only_the_missing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "is_done", lambda run: run.name == "a")
    monkeypatch.setattr(study, "RUNS", [StudyRun("a", ()), StudyRun("b/c", ("seed=1",))])
    commands = []

    def run(command, **options):
        commands.append(command)
        write_log(tmp_path / "runs/shakespeare/b/c" / LOG_NAME, [3.0])

    monkeypatch.setattr(study.subprocess, "run", run)
    assert study.main([]) == 0
    (command,) = commands
    assert command[-5:] == [
        "train.py",
        "experiment=shakespeare",
        "seed=1",
        "directory=runs/shakespeare/b/c",
        "resume=auto",
    ]
    kept = (tmp_path / "results/b/c.jsonl").read_text()
    assert '"train"' not in kept and kept.count('"eval"') == 1


@pytest.mark.parametrize("target", [2.9, 2.5, 2.0, 1.5, 1.0])
def test_the_target_is_reached_where_numpy_says(tmp_path, target):
    """The loss rises once between 2.0 and 2.1."""
    log = study_results.read_log(write_log(tmp_path / "log.jsonl", [3.0, 2.8, 2.0, 2.1, 1.0]))
    if target >= 2.0:
        step = np.interp(-target, [-3.0, -2.8, -2.0], [10, 20, 30])
    else:
        step = np.interp(-target, [-2.1, -1.0], [40, 50])
    point = reach(log, target)
    assert (point.tokens, point.w2s, point.s2w) == pytest.approx((5 * step, 40 * step, 80 * step))


def test_a_target_below_all_losses_is_not_reached(tmp_path):
    log = study_results.read_log(write_log(tmp_path / "log.jsonl", [3.0, 2.0]))
    assert reach(log, 1.9) is None
    assert reach(log, 3.5) == Point(50, 400, 800)


def test_rivals_are_met_at_their_rate(tmp_path):
    """Ours may send a hundredth more, not a tenth, and of what remains the lowest loss counts."""
    settings = [
        Setting("identity", "identity", ()),
        Setting("demo", "DeMo", ()),
        *(Setting(name, "rank", ()) for name in ("less", "same", "more")),
    ]
    for name, loss, sent in (
        *(("identity", 1.0, 800), ("demo", 2.0, 100)),
        *(("less", 1.9, 50), ("same", 1.8, 101), ("more", 1.5, 110)),
    ):
        write_log(tmp_path / f"{name}-seed0.jsonl", [3.0, loss], bytes_a_step=sent)
    assert rivals(read(tmp_path, settings)) == {"demo": "same"}


def test_the_readme_is_right_that_ours_is_ahead_of_other_methods():
    results = read(study.RESULTS)
    met = rivals(results)
    assert {"powersgd16", "dion15-normal4", "demo32", "demo128"} <= met.keys()
    for other, ours in met.items():
        assert mean(results[ours].final) < mean(results[other].final), (ours, other)


def test_the_findings_are_right_that_momentum_at_the_server_is_better():
    results = read(study.RESULTS)
    for served, without in ((3, 4), (6, 9), (12, 12)):
        ours, ef21 = results[f"served{served}"], results[f"fitted{without}"]
        assert mean(ours.final) < mean(ef21.final)


def test_the_target_is_the_uncompressed_loss_at_three_quarters(tmp_path):
    for seed, losses in enumerate(([4.0, 3.0, 2.5, 2.0], [4.0, 3.0, 2.7, 1.9])):
        write_log(tmp_path / f"identity-seed{seed}.jsonl", losses)
    results = read(tmp_path, [Setting("identity", "identity", (), seeds=(0, 1))])
    assert study_results.target_loss(results["identity"]) == pytest.approx(2.6)


def test_the_committed_figures_and_tables_are_up_to_date(tmp_path):
    """The page byte for byte; figures as pictures, since fonts may differ in a pixel."""
    assert (study.RESULTS.parent / "README.md").read_text() == report(
        read(study.RESULTS), read_replay(study.RESULTS)
    )
    written = study_figures.draw(study.RESULTS, tmp_path)
    pictures = [path for path in written if path.suffix == ".png"]
    assert pictures
    for path in pictures:
        mine, theirs = (
            matplotlib.image.imread(path),
            matplotlib.image.imread(study.RESULTS / path.name),
        )
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).mean() < 0.01


def test_the_readme_has_the_headline():
    readme = " ".join((study.ROOT / "README.md").read_text().replace("*", "").split())
    assert headline(read(study.RESULTS)) in readme


def test_findings_are_told_where_their_runs_are_done():
    results = read(study.RESULTS)
    target, replayed = study_results.target_loss(results["identity"]), read_replay(study.RESULTS)
    told = findings(results, target, replayed)
    assert told.count("**") == 2 * len(told.split("\n\n"))
    assert all(len(line) <= 100 for line in told.splitlines())
    of_ranks = "rank 20, 15, 10 and 5 % save"
    assert of_ranks in " ".join(told.split())
    without = {name: result for name, result in results.items() if name != "rank20"}
    assert of_ranks not in " ".join(findings(without, target, {}).split())


def test_findings_speak_of_settings_alone():
    names = {name for _, several in PLACE.findall(TEXT.read_text()) for name in several.split()}
    assert names <= {setting.name for setting in SETTINGS}


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
    write_log(tmp_path / "identity-seed0.jsonl", [3.0, 2.0])
    results = read(tmp_path, [Setting("identity", "identity", ())])
    log = tmp_path / "network.jsonl"
    timed = [("100mbit", "identity", 2.0), ("1gbit", "identity", 0.5), ("1gbit", "other", 9.0)]
    lines = [json.dumps(dict(zip(("rate", "name", "seconds"), one, strict=True))) for one in timed]
    log.write_text("\n".join(lines))
    found = study_results.times(results, 2.5, log)  # reached after 15 steps
    assert found == {"100mbit": {"identity": 30.0}, "1gbit": {"identity": 7.5}}
