"""Pictures of logs that are written here: what is drawn, and how."""

import os
import subprocess
import sys

import matplotlib
import pytest
from logs import END, EVALS, RUN, evaluation, write_log
from run import ROOT

from training.picture import build_figure, draw, unique_labels
from training.records import find_runs, read_log


def lines_of(figure, panel):
    """The drawn curves of a panel: {label: [(x, y), ...]}."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in figure.axes[panel].lines
    }


def test_figure_shows_loss_against_tokens_and_against_model_sizes_sent(tmp_path):
    log = read_log(write_log(tmp_path, RUN, *EVALS, END))
    sign = read_log(write_log(tmp_path, RUN, EVALS[0], evaluation(10, 4.0, 100), END))
    figure = build_figure([log, sign], ["rank", "sign"])
    assert lines_of(figure, 0) == {
        "rank": [(0, 5.5), (500, 3.0), (1000, 2.0)],
        "sign": [(0, 5.5), (500, 4.0)],
    }
    # 100 parameters are 400 bytes; the evaluation before the first message is left out.
    assert lines_of(figure, 1) == {"rank": [(5, 3.0), (10, 2.0)], "sign": [(0.25, 4.0)]}
    assert figure.axes[1].get_xscale() == "log"
    assert figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel()
    assert "model size" in figure.axes[1].get_xlabel()


def test_run_that_sends_nothing_is_drawn_against_tokens_only(tmp_path):
    log = read_log(write_log(tmp_path, RUN, evaluation(0, 5.5, 0), evaluation(10, 3.0, 0)))
    figure = build_figure([log], ["alone"])
    assert len(lines_of(figure, 0)["alone"]) == 2
    assert lines_of(figure, 1)["alone"] == []
    assert [text.get_text() for text in figure.axes[1].texts] == ["no bytes sent"]


@pytest.mark.parametrize("tail", ["", '{"record": "eval", "step": 30, "tok'])
def test_unfinished_run_is_drawn_as_far_as_it_got(tmp_path, tail):
    log = read_log(write_log(tmp_path, RUN, *EVALS, tail=tail))
    assert log.end is None
    assert len(lines_of(build_figure([log], ["run"]), 0)["run"]) == 3
    assert draw([tmp_path], tmp_path / "out")


def test_looks_differ_and_a_long_legend_stands_outside(tmp_path):
    log = read_log(write_log(tmp_path, RUN, *EVALS))
    few, many = (build_figure([log] * n, [f"run {i}" for i in range(n)]) for n in (8, 30))
    looks = {(x.get_color(), x.get_linestyle(), x.get_marker()) for x in many.axes[0].lines}
    assert len(looks) == 30
    assert few.axes[0].get_legend() and not few.legends
    assert not many.axes[0].get_legend() and len(many.legends[0].get_texts()) == 30


def test_last_evaluation_is_marked_however_many_there_are(tmp_path):
    for count in (1, 2, 9, 10, 11, 25, 57):
        evals = [evaluation(step, 3.0, 100 * step) for step in range(count)]
        figure = build_figure([read_log(write_log(tmp_path, RUN, *evals))], ["run"])
        start, step = figure.axes[0].lines[0].get_markevery()
        assert (count - 1 - start) % step == 0 <= start < step
        assert min(count, 10) <= len(range(start, count, step)) < 20


def test_equal_labels_get_their_directories(tmp_path):
    write_log(tmp_path / "seed" / "one", RUN, *EVALS)
    write_log(tmp_path / "seed" / "two", RUN, *EVALS)
    write_log(tmp_path / "sign", {**RUN, "label": "sign"}, *EVALS)
    runs = find_runs(tmp_path)
    logs = [read_log(run / "metrics.jsonl") for run in runs]
    assert unique_labels(logs, runs) == [
        "rank 15% natural (seed/one)",
        "rank 15% natural (seed/two)",
        "sign",
    ]
    assert unique_labels(logs[1:], runs[1:]) == ["rank 15% natural", "sign"]


def test_same_logs_give_the_same_bytes_and_leave_the_settings_alone(tmp_path):
    write_log(tmp_path / "run", RUN, *EVALS, END)
    first = draw([tmp_path / "run"], tmp_path / "first")
    before = dict(matplotlib.rcParams)
    second = draw([tmp_path / "run"], tmp_path / "second")
    assert dict(matplotlib.rcParams) == before
    assert [path.name for path in first] == ["test_loss.png", "test_loss.svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert b"dc:date" not in first[1].read_bytes()


SAVE = ["-c", "import sys; from training.drawing import Figure; Figure().savefig(sys.argv[1])"]


@pytest.mark.parametrize(
    ("backend", "command"),
    [
        ("module://matplotlib_inline.backend_inline", SAVE),
        ("nonsense", SAVE),
        pytest.param("nonsense", ["scripts/figures.py"], marks=pytest.mark.slow),
    ],
)
def test_pictures_need_no_backend_that_the_environment_names(tmp_path, backend, command):
    """All that draw import matplotlib by `training.drawing`, which tests/test_house.py sees to."""
    write_log(tmp_path, RUN, *EVALS, END)
    where = tmp_path / "test_loss.png"
    command = [sys.executable, *command, where if command == SAVE else tmp_path]
    environment = os.environ | {"MPLBACKEND": backend}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert where.exists()


def test_a_picture_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    write_log(tmp_path, RUN, *EVALS, END)
    before = [path.read_bytes() for path in draw([tmp_path], tmp_path)]
    names = {path.name for path in tmp_path.iterdir()}

    def full(figure, file, **options):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        draw([tmp_path], tmp_path)
    assert [(tmp_path / f"test_loss.{kind}").read_bytes() for kind in ("png", "svg")] == before
    assert {path.name for path in tmp_path.iterdir()} == names
