"""What a run prints, and that it comes to its end where nobody reads it or no picture is drawn."""

import io
import json
import signal
import sys

import pytest

import train
from training.console import Display, lenient_output, write_line


class Broken(io.StringIO):
    """A stream that fails from a write on."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.left = error, after

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)

    def flush(self):
        if self.left < 0:
            raise self.error


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "a pipe without a reader": lambda: Broken(BrokenPipeError(32, "Broken pipe")),
    "a pipe whose reader leaves": lambda: Broken(BrokenPipeError(32, "Broken pipe"), after=2),
    "a full disk": lambda: Broken(OSError(28, "No space left on device")),
    "a terminal that is gone": lambda: Broken(OSError(5, "Input/output error"), after=2),
    "letters that it has not": lambda: Broken(UnicodeEncodeError("ascii", "é", 0, 1, "not in it")),
}


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def end_of(run) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture
def main(small, tmp_path, monkeypatch):
    """train.py in this process; returns its status and the end record."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    short = ("steps=2", "checkpoint.every=0", f"directory={tmp_path}/run")
    monkeypatch.setattr("sys.argv", ["train.py", *small, *short])

    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    handlers = [signal.getsignal(number) for number in numbers]
    yield lambda: (train.main(), end_of(tmp_path / "run")["status"])
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        *((("stderr",), what) for what in STREAMS),
        *((("stdout",), what) for what in ("none", "a pipe without a reader")),
        *(
            pytest.param(("stdout",), what, marks=pytest.mark.slow)
            for what in [*STREAMS][1:]
            if what != "a pipe without a reader"
        ),
        (("stdout", "stderr"), "none"),
        (("stdout", "stderr"), "a full disk"),
    ],
)
def test_a_run_outlives_its_readers(main, monkeypatch, capsys, names, what):
    for name in names:
        monkeypatch.setattr(sys, name, STREAMS[what]())
    assert main() == (0, "completed")
    said = capsys.readouterr()
    warnings = (said.out + said.err).count("warning: standard ")
    assert warnings == (len(names) == 1 and what != "none")


PICTURES = {
    "a fault of matplotlib": ValueError("Image size of 900x99999999 pixels is too large"),
    "a full disk": OSError(28, "No space left on device"),
    "no memory": MemoryError(),
    "no fonts": RuntimeError("In FT2Font:\nCan not load face"),
}


@pytest.mark.parametrize(
    "what", ["a fault of matplotlib", "no memory", *map(slow, ("a full disk", "no fonts"))]
)
def test_a_run_outlives_its_picture(main, monkeypatch, capsys, what):
    def draw(*_):
        raise PICTURES[what]

    monkeypatch.setattr("training.picture.draw", draw)
    assert main() == (0, "completed")
    said = capsys.readouterr().err
    told = "draw it later with python scripts/figures.py "
    assert said.count("warning: matplotlib has drawn no picture (") == said.count(told) == 1


@pytest.mark.parametrize("name", ["matplotlib", "training.picture"])
def test_a_run_needs_no_matplotlib(main, monkeypatch, capsys, name):
    monkeypatch.delitem(sys.modules, "training.picture")
    monkeypatch.delitem(sys.modules, "training.drawing")
    monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    assert main() == (0, "completed")
    assert capsys.readouterr().err.count("warning: matplotlib has drawn no picture (") == 1


@pytest.mark.parametrize("git", ["exec sleep 60", "exit 128", "printf '\\377'", None])
def test_a_run_outlives_git(main, monkeypatch, tmp_path, git):
    (tmp_path / "bin").mkdir()
    if git:
        (tmp_path / "bin/git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin" if git else f"{tmp_path}/bin")
    monkeypatch.setattr("training.log.GIT_SECONDS", 0.2)
    assert main() == (0, "completed")
    run = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert run["commit"] is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "bar"), [(Terminal, True), (io.StringIO, False)])
def test_a_bar_on_a_terminal_and_a_line_a_record_elsewhere(monkeypatch, stream, bar):
    monkeypatch.setattr(sys, "stderr", shown := stream())
    with lenient_output():
        display = Display(1000, 10)
        for step in range(11, 1001):
            display.advance(step)
            if step % 100 == 0:
                display.describe(step, f"loss {step}")
        write_line("a warning", error=True)
        display.close()
    text = shown.getvalue()
    assert ("1000/1000" in text) == ("step/s" in text) == bar
    lines = [f"step {step:>6} of 1000  loss {step}" for step in range(100, 1001, 100)]
    assert bar or text.splitlines() == [*lines, "a warning"]
    assert not bar or "\ra warning\n" in text
