"""The study's runs compose, its logs are what it asks for, and what is there is not run again."""

from functools import cache

import pytest
from logs import write_study_log
from omegaconf import OmegaConf

from scripts.shakespeare import results as study_results
from scripts.shakespeare import run as study
from scripts.shakespeare.runs import RUNS, StudyRun
from training.config import compose
from training.records import LOG_NAME

OF_HALF_THE_STEPS = ("grid/", "momentum/", "muon_feedback/", "signs/")
composed = cache(compose)  # a fifth of a second each, and asked for twice


def test_names_are_unique_and_every_run_composes():
    assert len({run.name for run in RUNS}) == len(RUNS)
    for run in RUNS:
        config = composed(study.overrides(run)).config
        assert config.steps == (300 if run.name.startswith(OF_HALF_THE_STEPS) else 600)
        assert config.model.context * config.batch.sequences == 4096


def test_a_log_is_cut_not_edited(tmp_path):
    log = write_study_log(tmp_path / "log.jsonl", [3.0, 2.0]).read_text()
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
    write_study_log(tmp_path / "one.jsonl", [3.0], config=whole)
    assert study.is_done(run)
    write_study_log(tmp_path / "one.jsonl", [3.0], config=whole | {"seed": 4})
    with pytest.raises(ValueError, match=r"one.jsonl: seed=3 \(the log has 4\); remove it"):
        study.is_done(run)
    del whole["seed"]  # a key that an earlier version did not have
    write_study_log(tmp_path / "one.jsonl", [3.0], config=whole)
    assert study.is_done(run)


def test_every_log_is_of_the_configuration_that_the_study_asks_for(monkeypatch):
    monkeypatch.setattr(study, "compose", composed)
    for run in RUNS:
        study.is_done(run)
    logs = {path.relative_to(study.RESULTS).as_posix() for path in study.RESULTS.rglob("*.jsonl")}
    measured = {
        getattr(study_results, f"{log}_LOG")
        for log in ("NETWORK", "REPLAY", "DIFFERENCES", "CHANGES", "SIGN_REPLAY")
    }
    assert logs - measured <= {f"{run.name}.jsonl" for run in RUNS}


def test_only_the_missing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "is_done", lambda run: run.name == "a")
    monkeypatch.setattr(study, "RUNS", [StudyRun("a", ()), StudyRun("b/c", ("seed=1",))])
    commands = []

    def run(command, **options):
        commands.append(command)
        write_study_log(tmp_path / "runs/shakespeare/b/c" / LOG_NAME, [3.0])

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
