"""scripts/figures.py: what its command line draws, and what is refused."""

import pytest
from logs import END, EVALS, RUN, TRAIN, write_log
from run import script

from scripts.figures import main
from training.picture import draw
from training.records import read_log


def test_command_line_draws_one_run_and_a_study(tmp_path, monkeypatch):
    study = tmp_path / "study"
    for name in ("a", "b/c"):
        write_log(study / name, {**RUN, "label": name}, *EVALS, END)
    one_run = script("scripts/figures.py", study / "a")
    assert sorted(path.name for path in study.rglob("test_loss.*")) == [
        "test_loss.png",
        "test_loss.svg",
    ]
    assert one_run.stdout.split() == [
        str(study / "a" / f"test_loss.{end}") for end in ("png", "svg")
    ]

    drawn = {}

    def save(figure, stem):
        drawn[stem] = [line.get_label() for line in figure.axes[0].lines]
        return []

    monkeypatch.setattr("training.picture.save", save)
    assert main([str(study)]) == 0
    assert main([str(study / "a"), str(study), "--out", str(tmp_path / "out")]) == 0
    # A run given twice is drawn once: same picture as the study alone.
    assert [*drawn] == [study / "test_loss", tmp_path / "out" / "test_loss"]
    assert all(lines == ["a", "b/c"] for lines in drawn.values())


@pytest.mark.parametrize(
    "records, tail, message",
    [
        ([RUN, TRAIN], "", "metrics.jsonl has no eval record"),
        ([], "", "metrics.jsonl has no eval record"),
        ([{**RUN, "schema": 2}, *EVALS], "", "metrics.jsonl:1: schema is 2, this program reads 1"),
        ([RUN, *EVALS], "{broken\n", r"metrics.jsonl:5: not JSON \(.*, column 2\)"),
        ([RUN, *EVALS], "\n", "metrics.jsonl:5: not JSON"),
        ([RUN, *EVALS], "[1]\n", "metrics.jsonl:5: record is None, allowed are run, train"),
        ([RUN, {"record": "note"}], "", "metrics.jsonl:2: record is 'note', allowed are"),
        ([*EVALS], "", "metrics.jsonl:1: record is 'eval', but line 1"),
        ([RUN, *EVALS, RUN], "", "metrics.jsonl:5: record is 'run', but line 1"),
        ([{"record": "run", "schema": 1}], "", ":1: the run record lacks label, parameters"),
        ([RUN, {"record": "eval", "tokens": 1}], "", ":2: the eval record lacks test_loss, w2s"),
    ],
)
def test_damaged_log_is_refused(tmp_path, capsys, records, tail, message):
    path = write_log(tmp_path, *records, tail=tail)
    with pytest.raises(ValueError, match=message):
        read_log(path)
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"figures.py: {path}") and error.count("\n") == 1
    assert not list(tmp_path.glob("test_loss.*"))


def test_missing_log_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"metrics.jsonl does not exist; give a directory"):
        draw([tmp_path], tmp_path)
    for directory in (tmp_path, tmp_path / "nowhere"):
        assert main([str(directory)]) == 1
        error = capsys.readouterr().err
        assert f"no metrics.jsonl in or below {directory}" in error and error.count("\n") == 1
