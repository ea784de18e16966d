"""The study's runs compose, its logs are what it asks for, and what is there is not run again."""

import json
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


def test_every_run_composes_and_every_log_is_of_what_the_study_asks_for(monkeypatch):
    assert len({run.name for run in RUNS}) == len(RUNS)
    composed = cache(compose)  # a fifth of a second each
    monkeypatch.setattr(study, "compose", composed)
    for run in RUNS:
        if not study.is_done(run) and run.name.endswith("-seed0"):  # others have another seed
            composed(study.overrides(run))
        if not run.name.startswith("sizes/") and run.name.endswith("-seed0"):
            config = composed(study.overrides(run)).config
            assert config.steps == (300 if run.name.startswith(OF_HALF_THE_STEPS) else 600)
            assert config.model.context * config.batch.global_size == 4096
    logs = {path.relative_to(study.RESULTS).as_posix() for path in study.RESULTS.rglob("*.jsonl")}
    measured = {
        getattr(study_results, f"{log}_LOG")
        for log in ("NETWORK", "REPLAY", "DIFFERENCES", "CHANGES", "SIGN_REPLAY")
    }
    assert logs - measured <= {f"{run.name}.jsonl" for run in RUNS}


def test_the_largest_30_percent_in_signs_are_the_signs_of_all(tmp_path, monkeypatch):
    """A log that asked for them is that of a run which asks for all."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    run = StudyRun("signs", ("compressor@w2s=sign",))
    for fraction, done in ((0.3, True), (0.1, False)):
        asked = ("compressor@w2s=topk", f"w2s.fraction={fraction}", "w2s.values=sign")
        config = compose(study.overrides(StudyRun("signs", asked))).config
        record = {"config": OmegaConf.to_container(config, resolve=True)}
        study.log_of(run).write_text(json.dumps(record) + "\n")
        if done:
            assert study.is_done(run)
            continue
        with pytest.raises(ValueError, match=r"w2s\._target_"):
            study.is_done(run)


def test_a_log_is_cut_not_edited(tmp_path):
    log = write_study_log(tmp_path / "log.jsonl", [3.0, 2.0]).read_text()
    kept = study.cut(log)
    assert kept.splitlines() == [line for line in log.splitlines() if '"train"' not in line]
    with pytest.raises(ValueError, match="start the study again to resume"):
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
    for asked, done in (("schedule.floor=0.1", False), ("schedule.floor=0", True)):
        later = StudyRun("one", (*run.overrides, asked))  # what there was no choice of before
        before = whole | {"schedule": {"warmup": 0.0, "cooldown": 0.4}}
        write_study_log(tmp_path / "one.jsonl", [3.0], config=before)
        if done:
            assert study.is_done(later)
            continue
        with pytest.raises(ValueError, match=r"schedule\.floor=0\.1 \(the log has None\)"):
            study.is_done(later)
    del whole["seed"]  # a key that an earlier version did not have
    write_study_log(tmp_path / "one.jsonl", [3.0], config=whole)
    assert study.is_done(run)


def trained(monkeypatch, root, failing=(), lasts=0):
    """The commands of trainings that are done at once, or after so many looks; some fail."""
    commands = []

    class Training:
        def __init__(self, command, **options):
            commands.append(command)
            self.args, self.looks = command, 0
            (place,) = (word for word in command if word.startswith("directory="))
            self.name = place.removeprefix("directory=runs/shakespeare/")
            write_study_log(root / "runs/shakespeare" / self.name / LOG_NAME, [3.0])

        def poll(self):
            self.looks += 1
            self.returncode = int(self.name in failing)
            return self.returncode if self.looks > lasts else None

        def wait(self):
            return self.poll()

    monkeypatch.setattr(study.subprocess, "Popen", Training)
    return commands


def test_runs_go_on_at_once_as_far_as_their_workers_have_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "POLL", 0)
    counts = {"a": 8, "b": 4, "c": 2, "d": 4}
    monkeypatch.setattr(study, "RUNS", [StudyRun(name, (), n) for name, n in counts.items()])
    begun = trained(monkeypatch, tmp_path, failing="b", lasts=3)
    busy = []
    monkeypatch.setattr(study.time, "sleep", lambda seconds: busy.append(len(begun)))
    assert study.main(["--processes", "7"]) == 1
    assert busy[:3] == [1, 1, 1]  # the first has more than there are places: alone
    names = [word[-1] for command in begun for word in command if word.startswith("directory=")]
    assert names == ["a", "b", "c", "d"] and busy[4] == 3
    assert f"b: failed, see {tmp_path}" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "results").iterdir()} == {"a", "c", "d"}


def test_what_is_of_a_gpu_is_left_out_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RUNS", [StudyRun("a", (), 8, device="cuda"), StudyRun("b", ())])
    monkeypatch.setattr(study, "is_done", lambda run: False)
    begun = trained(monkeypatch, tmp_path)
    for there in (False, True):
        monkeypatch.setattr(study.torch.cuda, "is_available", lambda there=there: there)
        assert study.main([]) == 0
        printed = capsys.readouterr().out
        assert ("left for a machine with a GPU: a" in printed) == (not there)
    names = [word[10:] for command in begun for word in command if word.startswith("directory=")]
    assert [name.rpartition("/")[2] for name in names] == ["b", "a", "b"]


def test_only_the_missing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "is_done", lambda run: run.name == "a")
    monkeypatch.setattr(study, "RUNS", [StudyRun("a", ()), StudyRun("b/c", ("seed=1",))])
    commands = trained(monkeypatch, tmp_path)
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
