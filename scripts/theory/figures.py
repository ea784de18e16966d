"""Tables, pictures and README.md of `scripts/theory/run.py`, from its records alone."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import log
from pathlib import Path

import numpy as np

from scripts.studies import fill, markdown, select
from scripts.theory import studies
from training.picture import COLOURS, panels

TEXT = Path(__file__).with_name("report.md")
LABELS = {"top": "top 25%", "rank": "rank 25%"}
LOOKS = {  # the lines lie upon each other
    "top": {"color": COLOURS[1], "marker": "o", "markersize": 8, "linewidth": 3},
    "rank": {"color": COLOURS[0], "marker": "s"},
}
NAMES = {"none": "none", "ef14": "EF14", "ef21": "EF21"}
VARIANT_COLOURS = {"none": COLOURS[1], "ef14": COLOURS[5], "ef21": COLOURS[0]}
LINES = ("-", "--")
GREY = "#777777"


def draw(records: Sequence[dict], directory: Path) -> str:
    """Write README.md and the pictures; returns the page."""
    (run,) = select(records, record="run")
    values = {
        **{"torch": run["torch"], "workers": studies.WORKERS, "replicas": studies.REPLICAS},
        "bounds": bounds_table(records),
        "feedback": feedback_table(records),
        "momentum_replicas": studies.MOMENTUM_REPLICAS,
        "momentum": momentum_table(records),
    }
    page = fill(TEXT.read_text(), values)
    (directory / "README.md").write_text(page)
    draw_bounds(records, directory / "bounds")
    draw_feedback(records, directory / "feedback")
    return page


def curves(records: Sequence[dict]) -> Iterator[tuple[dict, list[dict]]]:
    """What identifies a case, and the records of its simulated horizons."""
    for fields in map(asdict, studies.CASES):
        yield fields, select(records, record="bound", run="simulate", **fields)


def slope(points: Sequence[dict], name: str = "measured") -> float:
    """d log `name` / d log K over these horizons, by least squares."""
    logs = [(log(point["rounds"]), log(point[name])) for point in points]
    return np.polyfit(*zip(*logs, strict=True), 1)[0]


def bounds_table(records: Sequence[dict]) -> str:
    """The shortest and the longest horizon of every case, and the slopes at the end."""
    rows = [["theorem", "geometry", "noise", "w2s", *2 * ["K", "measured", "bound"]]]
    rows[0] += ["slope", "of the bound"]
    for fields, points in curves(records):
        row = [fields["theorem"], fields["geometry"], f"{fields['sigma']:g}", LABELS[fields["w2s"]]]
        for point in (points[0], points[-1]):
            row += [str(point["rounds"]), f"{point['measured']:.3g}", f"{point['bound']:.3g}"]
        rows.append([*row, *(f"{slope(points[-2:], name):.2f}" for name in ("measured", "bound"))])
    return markdown(rows, text_columns=2)


def feedback_table(records: Sequence[dict]) -> str:
    """Gradient norms of every variant at the start and over the last tenth."""
    rows = [["feedback", "workers", "step size", "at first", "rounds"]]
    rows[0] += ["least of last tenth", "most"]
    for record in select(records, record="feedback"):
        norms = record["gradient_norms"]
        last = norms[-len(norms) // 10 :]
        row = [NAMES[record["feedback"]], str(record["workers"]), f"{record['step_size']:g}"]
        row += [f"{norms[0]:.3g}", str(len(norms) - 1), f"{min(last):.2g}", f"{max(last):.2g}"]
        rows.append(row)
    return markdown(rows)


def momentum_table(records: Sequence[dict]) -> str:
    horizons = [f"K = {rounds}" for rounds in studies.MOMENTUM_HORIZONS]
    rows = [["momentum", *horizons, "slope", "rate"]]
    for kind, (_, _, rate) in studies.ORDERS.items():
        points = select(records, momentum=kind)
        measured = (f"{point['measured']:.3f}" for point in points)
        rows.append([kind, *measured, f"{slope(points):.2f}", f"-{rate:.2f}"])
    return markdown(rows)


def draw_bounds(records: Sequence[dict], stem: Path) -> None:
    """Gradient norm against K, a row for each geometry, a column for each theorem and noise."""
    columns = list(dict.fromkeys((case.theorem, case.sigma) for case in studies.CASES))
    with panels(stem, 11, 5.5, 2, len(columns), sharex="col") as grid:
        for fields, points in curves(records):
            row = studies.GEOMETRIES.index(fields["geometry"])
            axes = grid[row][columns.index((fields["theorem"], fields["sigma"]))]
            rounds, label = [point["rounds"] for point in points], LABELS[fields["w2s"]]
            first = fields["w2s"] == "top"
            if first:  # both compressors have the same alpha
                bound = [point["bound"] for point in points]
                axes.plot(rounds, bound, color=GREY, linestyle="--", label="bound")
            measured = [point["measured"] for point in points]
            axes.plot(rounds, measured, label=label, **LOOKS[fields["w2s"]])
            (real,) = select(records, record="bound", run="train", **fields)
            look = {"color": "#000000", "marker": "x", "linestyle": "", "zorder": 3}
            label = None if first else "EF21Muon"
            axes.plot([real["rounds"]], [real["measured"]], label=label, **look)
            axes.set(xscale="log", yscale="log")
        for axes, (theorem, sigma) in zip(grid[0], columns, strict=True):
            axes.set_title(f"{theorem}, $\\sigma$ = {sigma:g}")
            measured = "root mean square" if theorem == studies.THEOREMS[0] else "least"
            axes.text(0.97, 0.95, measured, ha="right", va="top", transform=axes.transAxes)
        for axes in grid[-1]:
            axes.set_xlabel("K")
        for axes, place in zip(grid[:, 0], studies.GEOMETRIES, strict=True):
            axes.set_ylabel(f"gradient norm, dual of {place}")
        legend = grid[0, 0].get_legend_handles_labels()
        grid[0, 0].figure.legend(*legend, loc="outside lower center", ncols=4)


def draw_feedback(records: Sequence[dict], stem: Path) -> None:
    """Gradient norm against rounds: two workers with two step sizes, and three workers."""
    with panels(stem, 9, 3.8, 1, 2) as pair:
        for workers, axes in zip((2, 3), pair, strict=True):
            drawn = select(records, record="feedback", workers=workers)
            steps = list(dict.fromkeys(record["step_size"] for record in drawn))
            for record in drawn:
                variant, step = record["feedback"], record["step_size"]
                look = {"color": VARIANT_COLOURS[variant], "linestyle": LINES[steps.index(step)]}
                axes.plot(
                    record["gradient_norms"], label=f"{NAMES[variant]}, step {step:g}", **look
                )
            axes.set(yscale="log", xlabel="round", title=f"{workers} workers")
            axes.legend()
        pair[0].set_ylabel("gradient norm")
