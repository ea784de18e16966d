"""Draw test loss against tokens and against bytes sent, one line a run.

    python scripts/figures.py RUN_OR_STUDY_DIR... [--out DIR]

A run directory holds a `metrics.jsonl`; a study directory holds run directories, at any depth. The
figure is written as test_loss.png and test_loss.svg into DIR; without --out into the directory that
was given, or into the common parent of several. The same logs always give the same files.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

LOG_NAME = "metrics.jsonl"
SCHEMA = 1
NEEDED_FIELDS = {
    "run": ("label", "parameters"),
    "train": (),
    "eval": ("tokens", "test_loss", "w2s_bytes"),
    "end": (),
    "diagnostics": (),
    "elastic": (),
}
BYTES_PER_PARAMETER = 4

# The colours of Okabe and Ito (https://jfly.uni-koeln.de/color/) but for yellow, which is lost on
# white paper. Three cycles of different lengths: runs that share a colour differ in the rest.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
MARKERS_A_LINE = 10
MOST_RUNS_IN_INNER_LEGEND = 8

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.edgecolor": "none",
    "legend.handlelength": 3.5,
    "savefig.dpi": 200,
    "svg.hashsalt": "ef21-muon",
}


@dataclass(frozen=True)
class Log:
    """The records of one metrics.jsonl; `end` is None while the run is not finished."""

    run: dict
    train: list[dict]
    evals: list[dict]
    end: dict | None


def read_log(path: Path) -> Log:
    """Read and check the log at `path`.

    A last line that ends before its newline and is no JSON is a record still being written, or cut
    off when the run was killed, and is left out. Raises ValueError, naming the file and the line,
    for a missing file, a broken line, a missing field, an unknown schema, and a log without evals.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a directory that holds a {LOG_NAME}")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records: dict[str, list[dict]] = {kind: [] for kind in NEEDED_FIELDS}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            fault = f"not JSON ({error.msg}, column {error.colno})"
        else:
            fault = _fault(record, first=number == 1)
        if fault:
            raise ValueError(f"{path}:{number}: {fault}; mend the line or leave the run out")
        records[record["record"]].append(record)
    if not records["eval"]:
        raise ValueError(f"{path} has no eval record; draw it after the run's first evaluation")
    return Log(
        run=records["run"][0],
        train=records["train"],
        evals=records["eval"],
        end=records["end"][-1] if records["end"] else None,
    )


def _fault(record: object, first: bool) -> str | None:
    kind = record.get("record") if isinstance(record, dict) else None
    if kind not in NEEDED_FIELDS:
        return f"record is {kind!r}, allowed are {', '.join(NEEDED_FIELDS)}"
    if first != (kind == "run"):
        return f"record is {kind!r}, but line 1 and no other is the run record"
    if first and record.get("schema") != SCHEMA:
        return f"schema is {record.get('schema')!r}, this program reads {SCHEMA}"
    missing = [field for field in NEEDED_FIELDS[kind] if field not in record]
    return f"the {kind} record lacks {', '.join(missing)}" if missing else None


def find_runs(directory: Path) -> list[Path]:
    """The run directories at or below `directory`, sorted. Raises ValueError when there is none."""
    directory = Path(directory)
    runs = sorted(path.parent for path in directory.rglob(LOG_NAME))
    if not runs:
        raise ValueError(f"no {LOG_NAME} in or below {directory}; give a run or study directory")
    return runs


def unique_labels(logs: Sequence[Log], run_directories: Sequence[Path]) -> list[str]:
    """The label of each run, with its directory where several runs share one."""
    labels = [log.run["label"] for log in logs]
    shared = {label for label, count in Counter(labels).items() if count > 1}
    if not shared:
        return labels
    parent = os.path.commonpath(run_directories)
    return [
        f"{label} ({os.path.relpath(directory, parent)})" if label in shared else label
        for label, directory in zip(labels, run_directories, strict=True)
    ]


def build_figure(logs: Sequence[Log], labels: Sequence[str]) -> Figure:
    """The figure: test loss against tokens on the left, against w2s bytes on the right.

    Bytes are one worker's, in sizes of the model (4 bytes a parameter). The right axis is
    logarithmic, so evaluations before the first sent byte appear on the left only.
    """
    outside = len(logs) > MOST_RUNS_IN_INNER_LEGEND
    with matplotlib.rc_context(STYLE):
        size = (12, max(3.8, 0.2 * len(logs))) if outside else (9, 3.8)
        figure = Figure(figsize=size, layout="constrained")
        by_tokens, by_bytes = figure.subplots(1, 2, sharey=True)
        for index, (log, label) in enumerate(zip(logs, labels, strict=True)):
            look = {"label": label} | line_look(index)
            losses = [record["test_loss"] for record in log.evals]
            tokens = [record["tokens"] for record in log.evals]
            model_bytes = BYTES_PER_PARAMETER * log.run["parameters"]
            sent = [record["w2s_bytes"] / model_bytes for record in log.evals]
            start = next((i for i, size in enumerate(sent) if size > 0), len(sent))
            _plot(by_tokens, tokens, losses, look)
            _plot(by_bytes, sent[start:], losses[start:], look)

        _describe(by_tokens, by_bytes)
        handles = by_tokens.get_legend_handles_labels()
        if outside:
            figure.legend(*handles, loc="outside right center")
        else:
            by_tokens.legend(*handles, loc="upper right")
    return figure


def line_look(index: int) -> dict:
    """Colour, line and marker of a figure's line."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def plain_losses(axes) -> None:
    """Losses on the left as plain numbers."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def plain_sizes(axes, ticks_a_decade: Sequence[float] = (1, 2, 5)) -> None:
    """Sizes below, on a logarithmic axis, as plain numbers."""
    axes.xaxis.set_major_locator(LogLocator(subs=ticks_a_decade))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _plot(axes, x: list, y: list, look: dict) -> None:
    step = max(1, len(x) // MARKERS_A_LINE)
    last_marked = ((len(x) - 1) % step, step)
    axes.plot(x, y, markevery=last_marked, **look)


def _describe(by_tokens, by_bytes) -> None:
    by_tokens.set(xlabel="training tokens", ylabel="test loss (nats per token)", yscale="log")
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
    plain_losses(by_tokens)
    by_bytes.set(xlabel="bytes sent to the server per worker / model size")
    if any(len(line.get_xdata()) for line in by_bytes.lines):
        by_bytes.set_xscale("log")
        least, most = by_bytes.get_xlim()
        ticks_a_decade = (1, 2, 5) if most / least < 10_000 else (1,)
        plain_sizes(by_bytes, ticks_a_decade)
    else:
        by_bytes.set_xticks([])
        by_bytes.text(0.5, 0.5, "no bytes sent", ha="center", transform=by_bytes.transAxes)


def draw(run_directories: Sequence[Path], output_directory: Path) -> list[Path]:
    """Draw the runs into `output_directory`; returns the two files. Raises like `read_log`."""
    run_directories = [Path(directory).resolve() for directory in run_directories]
    logs = [read_log(directory / LOG_NAME) for directory in run_directories]
    figure = build_figure(logs, unique_labels(logs, run_directories))
    output_directory = Path(output_directory)
    output_directory.mkdir(parents=True, exist_ok=True)
    return save(figure, output_directory / "test_loss")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.png and stem.svg, the same bytes for the same figure; returns the two files."""
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    with matplotlib.rc_context(STYLE):
        figure.savefig(png)
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", metavar="RUN_OR_STUDY_DIR", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path)
    options = parser.parse_args(arguments)
    try:
        given = [directory.resolve() for directory in options.directories]
        runs = list(dict.fromkeys(run for directory in given for run in find_runs(directory)))
        for path in draw(runs, options.out or Path(os.path.commonpath(given))):
            print(path)
    except (ValueError, OSError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
