"""The study's runs compose, its logs are what it asks for, and what is there is not run again."""

import json
from functools import cache
from pathlib import Path

import pytest
import yaml
from logs import study_records
from omegaconf import OmegaConf
from study_page import logs

from scripts.shakespeare import run as study
from scripts.shakespeare.run import RUNS, StudyRun
from scripts.shakespeare.runs import Setting
from training.config import compose
from training.records import LOG_NAME
from training.renamed import modern_config

OF_HALF_THE_STEPS = ("grid/", "momentum/", "muon_feedback/", "signs/")


def a_run(name, overrides="", workers=2, device="cpu"):
    return StudyRun(Setting(name, "a family", overrides, workers=workers, device=device), 0, "file")


def choices(run):
    """The overrides by which Hydra takes files."""
    return {word for word in run.overrides if "@" in word or word.startswith("optimizer=")}


def test_runs_of_all_choices_compose_and_their_logs_are_of_what_they_ask_for():
    left, some = set().union(*map(choices, RUNS)), []
    for run in sorted(RUNS, key=lambda run: -len(choices(run))):
        if run.name in logs() and choices(run) & left:
            left -= choices(run)
            some.append(run)
    assert not left and len(some) > 10
    assert study.missing_of(some) == []


def entry(config, key):
    for part in key.split("."):
        config = config.get(part, {}) if isinstance(config, dict) else {}
    return config


def test_every_log_has_what_its_run_overrides():
    assert len({run.name for run in RUNS}) == len(RUNS)
    assert logs().keys() <= {run.name for run in RUNS}
    differing = set()
    for run in (run for run in RUNS if run.name in logs()):
        config = modern_config(logs()[run.name][0]["config"])
        asked = dict(one.lstrip("+").split("=", 1) for one in run.overrides if "@" not in one)
        for key in asked.keys() - {"experiment", "optimizer", "resume", "directory"}:
            value = json.loads(json.dumps(yaml.safe_load(asked[key].replace(":", ": "))))
            if entry(config, key) != value:
                differing.add((run.name.rpartition("/")[0], key))
        steps = 300 if run.name.startswith(OF_HALF_THE_STEPS) else 600
        assert run.name.startswith("sizes/") or config["steps"] == steps
        assert config["model"]["context"] * config["batch"]["global_size"] == 4096
    # What there was no choice of, what takes the same steps, and signs of the largest 30 %.
    later = {("", "optimizer.mean"), ("grid", "optimizer.mean"), ("sizes", "precision")}
    assert differing <= later | {("sizes", "compile"), ("sizes", "transport")}


def write(log, run, records):
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(one) + "\n" for one in study.cut(run.name, records)))


def resolved(*overrides):
    config = compose(("experiment=shakespeare", *overrides)).config
    return OmegaConf.to_container(config, resolve=True)


def test_the_largest_30_percent_in_signs_are_the_signs_of_all(tmp_path, monkeypatch):
    """A log that asked for them is that of a run which asks for all."""
    monkeypatch.setattr(study, "LOGS", tmp_path)
    monkeypatch.setattr(study, "compose", cache(compose))
    run = a_run("signs", "compressor@w2s=sign")
    for fraction, done in ((0.3, True), (0.1, False)):
        asked = ("compressor@w2s=topk", f"w2s.fraction={fraction}", "w2s.values=sign")
        write(run.log, run, study_records([3.0], config=resolved(*asked)))
        if done:
            assert study.missing_of([run]) == []
            continue
        with pytest.raises(ValueError, match=r"w2s\._target_"):
            study.missing_of([run])


def test_a_log_is_cut_not_edited():
    records = study_records([3.0, 2.0], commit="abc")
    kept = study.cut("a-seed0", records)
    assert [one.pop("name") for one in kept] == 4 * ["a-seed0"]
    run, _, first, _, second, end = records
    dropped = {"seconds"}
    assert kept == [
        run,
        *({k: v for k, v in r.items() if k not in dropped} for r in (first, second)),
        end,
    ]
    with pytest.raises(ValueError, match="start the study again to resume"):
        study.cut("a-seed0", records[:-1])


def test_what_is_done_is_skipped_and_what_was_asked_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LOGS", tmp_path)
    monkeypatch.setattr(study, "compose", cache(compose))  # a fifth of a second each
    run = a_run("one")
    assert study.missing_of([run]) == [run]
    whole = resolved("seed=0")

    def with_log(config, *overrides):
        write(run.log, run, study_records([3.0], config=config))
        return study.missing_of([a_run("one", " ".join(overrides))])

    assert with_log(whole) == []
    with pytest.raises(ValueError, match=r"one-seed0 in \S+: seed=0 \(the log has 4\); remove its"):
        with_log(whole | {"seed": 4})
    before = whole | {"schedule": {"warmup": 0.0, "cooldown": 0.4}}
    assert with_log(before, "schedule.floor=0") == []  # what there was no choice of before
    with pytest.raises(ValueError, match=r"schedule\.floor=0\.1 \(the log has None\)"):
        with_log(before, "schedule.floor=0.1")
    del whole["seed"]  # a key that an earlier version did not have
    assert with_log(whole) == []


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The commands of trainings, which end after so many looks; some fail."""
    monkeypatch.setattr(study, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "POLL", 0)
    monkeypatch.setattr(study, "require_same", lambda run, config: None)

    class Training:
        commands, failing, lasts = [], (), 0

        def __init__(self, command, **options):
            self.commands.append(command)
            self.args, self.looks = command, 0
            (place,) = (word for word in command if word.startswith("directory="))
            self.name = place.removeprefix("directory=runs/shakespeare/")
            log = tmp_path / "runs/shakespeare" / self.name / LOG_NAME
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(
                "".join(json.dumps(one) + "\n" for one in study_records([3.0], config={}))
            )

        def poll(self):
            self.looks += 1
            return int(self.name in self.failing) if self.looks > self.lasts else None

        wait = poll

    monkeypatch.setattr(study.subprocess, "Popen", Training)
    return Training


def begun(trained):
    words = [word for command in trained.commands for word in command]
    return [Path(word).name for word in words if word.startswith("directory=")]


def kept(tmp_path):
    lines = (tmp_path / "logs/file.jsonl").read_text().splitlines()
    return [(one["name"], one["record"]) for one in map(json.loads, lines)]


def test_runs_go_on_at_once_as_far_as_their_workers_have_place(
    tmp_path, monkeypatch, capsys, trained
):
    counts = {"a": 8, "b": 4, "c": 2, "d": 4}
    monkeypatch.setattr(study, "RUNS", [a_run(name, workers=n) for name, n in counts.items()])
    trained.failing, trained.lasts, busy = ("b-seed0",), 3, []
    monkeypatch.setattr(study.time, "sleep", lambda seconds: busy.append(len(trained.commands)))
    assert study.main(["--processes", "7"]) == 1
    assert busy[:3] == [1, 1, 1]  # the first has more than there are places: alone
    assert begun(trained) == ["a-seed0", "b-seed0", "c-seed0", "d-seed0"] and busy[4] == 3
    assert f"b-seed0: failed, see {tmp_path}" in capsys.readouterr().out
    assert [name for name, record in kept(tmp_path) if record == "run"] == [
        *("a-seed0", "c-seed0", "d-seed0")
    ]


def test_what_is_of_a_gpu_is_left_out_without_one(monkeypatch, capsys, trained):
    monkeypatch.setattr(study, "RUNS", [a_run("a", workers=8, device="cuda"), a_run("b")])
    for there in (False, True):
        monkeypatch.setattr(study.torch.cuda, "is_available", lambda there=there: there)
        assert study.main([]) == 0
        printed = capsys.readouterr().out
        assert ("left for a machine with a GPU: a-seed0" in printed) == (not there)
    assert begun(trained) == ["b-seed0", "a-seed0"]


def test_only_the_missing_is_run_and_no_other_line_is_lost(tmp_path, monkeypatch, trained):
    runs = [a_run("a"), a_run("b/c", "steps=1")]
    monkeypatch.setattr(study, "RUNS", runs)
    write(runs[0].log, runs[0], study_records([2.0], config={}))
    before = runs[0].log.read_text()
    assert study.main([]) == 0
    (command,) = trained.commands
    assert command[-6:] == [
        "train.py",
        "experiment=shakespeare",
        "steps=1",
        "seed=0",
        "directory=runs/shakespeare/b/c-seed0",
        "resume=auto",
    ]
    assert runs[0].log.read_text().startswith(before)
    assert kept(tmp_path)[3:] == [("b/c-seed0", kind) for kind in ("run", "eval", "end")]
    study.finish(runs[0], trained(["directory=runs/shakespeare/a-seed0"]))
    assert [name for name, _ in kept(tmp_path)] == 3 * ["b/c-seed0"] + 3 * ["a-seed0"]
