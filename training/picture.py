"""Pictures of runs: test loss against tokens and against bytes sent, one line per run.

The same logs always give the same files.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.files import whole_file
from training.drawing import EngFormatter, Figure, LogLocator, MaxNLocator, NullLocator, matplotlib
from training.records import BYTES_PER_PARAMETER, LOG_NAME, Log, read_log

# The colours of Okabe and Ito (https://jfly.uni-koeln.de/color/), without yellow, which is hard to
# see on white paper. The three cycles have different lengths, so that runs of one colour differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
MARKERS_PER_LINE = 10
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


def unique_labels(logs: Sequence[Log], run_directories: Sequence[Path]) -> list[str]:
    """The label of each run, with its directory if several runs have the same label."""
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

    Bytes are those of one worker over the model size (4 bytes per parameter). The right axis is
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
        if outside:
            legend_outside(by_tokens)
        else:
            by_tokens.legend(loc="upper right")
    return figure


def line_look(index: int) -> dict:
    """The colour, line style and marker of the line with this index."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def plain_losses(axes) -> None:
    """Show losses on the vertical axis as plain numbers."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def plain_sizes(axes, ticks_per_decade: Sequence[float] = (1, 2, 5)) -> None:
    """Show sizes on the horizontal, logarithmic axis as plain numbers."""
    axes.xaxis.set_major_locator(LogLocator(subs=ticks_per_decade))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def plain_gaps(axes, linear: float = 1) -> None:
    """Show what may be below 0 on the vertical axis as plain numbers: straight up to `linear`."""
    axes.set_yscale("symlog", linthresh=linear)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def legend_outside(axes, **options) -> None:
    """The legend of a panel, to the right of the figure."""
    handles = axes.get_legend_handles_labels()
    axes.figure.legend(*handles, loc="outside right center", **options)


def ticks_alone(axes, labels: dict[float, str]) -> None:
    """Show only these values on the horizontal, logarithmic axis."""
    axes.set_xscale("log")
    axes.set_xticks(list(labels), list(labels.values()))
    axes.xaxis.set_minor_locator(NullLocator())


def _plot(axes, x: list, y: list, look: dict) -> None:
    step = max(1, len(x) // MARKERS_PER_LINE)
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
        ticks_per_decade = (1, 2, 5) if most / least < 10_000 else (1,)
        plain_sizes(by_bytes, ticks_per_decade)
    else:
        by_bytes.set_xticks([])
        by_bytes.text(0.5, 0.5, "no bytes sent", ha="center", transform=by_bytes.transAxes)


def draw(run_directories: Sequence[Path], output_directory: Path) -> list[Path]:
    """Draw the runs into `output_directory`; return the two files. Raises like `read_log`."""
    run_directories = [Path(directory).resolve() for directory in run_directories]
    logs = [read_log(directory / LOG_NAME) for directory in run_directories]
    figure = build_figure(logs, unique_labels(logs, run_directories))
    output_directory = Path(output_directory)
    output_directory.mkdir(parents=True, exist_ok=True)
    return save(figure, output_directory / "test_loss")


@contextmanager
def panels(stem: Path, width: float, height: float, *grid: int, **shared) -> Iterator:
    """One panel or a grid of them, in the style of all pictures, to draw in: then it is saved.

    stem: of the two files; grid, shared: rows, columns and what else Figure.subplots takes.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(*grid, **shared)
    save(figure, stem)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.png and stem.svg, the same bytes for the same figure; return the two files."""
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    with matplotlib.rc_context(STYLE):
        with whole_file(png) as file:
            figure.savefig(file, format="png")
        with whole_file(svg) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
    return [png, svg]
