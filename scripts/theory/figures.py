"""Tables, pictures and README.md of `scripts/theory/run.py`, from its records alone."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import log
from pathlib import Path

from scripts.theory.studies import (
    CASES,
    GEOMETRIES,
    REPLICAS,
    THEOREMS,
    VARIANTS,
    WORKERS,
)
from training.drawing import Figure, matplotlib
from training.picture import COLOURS, STYLE, save

TEXT = Path(__file__).with_name("report.md")
LABELS = {"top": "top 25%", "rank": "rank 25%"}
VARIANT_LABELS = {"none": "none", "ef14": "EF14", "ef21": "EF21"}
LOOKS = {  # the lines lie upon each other
    "top": {"color": COLOURS[1], "marker": "o", "markersize": 8, "linewidth": 3},
    "rank": {"color": COLOURS[0], "marker": "s"},
}
VARIANT_COLOURS = dict(zip(VARIANTS, (COLOURS[1], COLOURS[5], COLOURS[0]), strict=True))
LINES = ("-", "--", ":")


def select(records: Sequence[dict], kind: str, **fields) -> list[dict]:
    """The records of a kind with these fields."""
    return [
        record
        for record in records
        if record["record"] == kind and all(record[name] == fields[name] for name in fields)
    ]


def curves(records: Sequence[dict]) -> Iterator[tuple[dict, list[dict]]]:
    """What identifies a case, and the records of its simulated horizons."""
    for case in CASES:
        fields = asdict(case)
        yield fields, select(records, "bound", run="simulate", **fields)


def slope(points: Sequence[dict], name: str) -> float:
    """d log `name` / d log K between the two longest horizons."""
    first, second = points[-2:]
    return log(second[name] / first[name]) / log(second["rounds"] / first["rounds"])


def report(records: Sequence[dict]) -> str:
    """README.md: the text of scripts/theory/report.md, with the tables."""
    return TEXT.read_text().format(
        torch=records[0]["torch"],
        replicas=REPLICAS,
        workers=WORKERS,
        bounds=bounds_table(records),
        feedback=feedback_table(records),
        valley=valley_table(records),
    )


def bounds_table(records: Sequence[dict]) -> str:
    """The shortest and the longest horizon of every case in Markdown, and the slopes there."""
    lines = [
        "| theorem | geometry | noise | w2s | K | measured | bound | K | measured | bound "
        "| slope | of the bound |",
        "| --- | --- |" + 10 * " ---: |",
    ]
    for fields, points in curves(records):
        cells = [fields["theorem"], fields["geometry"], f"{fields['sigma']:g}"]
        cells.append(LABELS[fields["w2s"]])
        for point in (points[0], points[-1]):
            cells.append(str(point["rounds"]))
            cells += [f"{point[name]:.3g}" for name in ("measured", "bound")]
        cells += [f"{slope(points, name):.2f}" for name in ("measured", "bound")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def feedback_table(records: Sequence[dict]) -> str:
    """Gradient norms of every variant at the start and over the last tenth, in Markdown."""
    lines = [
        "| workers | step size | feedback | at first | rounds | least of last tenth | most |",
        "| ---: | ---: | --- |" + 4 * " ---: |",
    ]
    for record in select(records, "feedback"):
        norms = record["gradient_norms"]
        last = norms[-len(norms) // 10 :]
        cells = [str(record["workers"]), f"{record['step_size']:g}"]
        cells += [VARIANT_LABELS[record["feedback"]], f"{norms[0]:.3g}", str(len(norms) - 1)]
        lines.append(f"| {' | '.join(cells)} | {min(last):.2g} | {max(last):.2g} |")
    return "\n".join(lines)


def valley_table(records: Sequence[dict]) -> str:
    """Least values of every method and schedule in Markdown."""
    lines = [
        "| slope | beta | method | t^k or eta^k | f(X^0) | rounds | least f |",
        "| ---: | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for record in select(records, "valley"):
        cells = [f"{record['slope']:g}", f"{record['beta']:g}", record["method"]]
        cells += [record["schedule"], f"{record['start']:g}", str(record["rounds"][-1])]
        lines.append(f"| {' | '.join(cells)} | {record['least_value'][-1]:.2g} |")
    return "\n".join(lines)


def bounds_figure(records: Sequence[dict]) -> Figure:
    """Gradient norm against K, a row for each geometry, a column for each theorem and noise."""
    columns = list(dict.fromkeys((case.theorem, case.sigma) for case in CASES))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        panels = figure.subplots(len(GEOMETRIES), len(columns), sharex="col")
        for fields, points in curves(records):
            row = GEOMETRIES.index(fields["geometry"])
            axes = panels[row][columns.index((fields["theorem"], fields["sigma"]))]
            rounds = [point["rounds"] for point in points]
            if fields["w2s"] == "top":  # both compressors have the same alpha
                bound = [point["bound"] for point in points]
                axes.plot(rounds, bound, color="#777777", linestyle="--", label="bound")
            look = LOOKS[fields["w2s"]]
            measured = [point["measured"] for point in points]
            label = LABELS[fields["w2s"]]
            axes.plot(rounds, measured, label=label, **look)
            (real,) = select(records, "bound", run="train", **fields)
            look = {"color": "#000000", "marker": "x", "linestyle": "", "zorder": 3}
            label = "EF21Muon" if fields["w2s"] == "rank" else None
            axes.plot([real["rounds"]], [real["measured"]], label=label, **look)
            axes.set(xscale="log", yscale="log")
        for axes, (theorem, sigma) in zip(panels[0], columns, strict=True):
            axes.set_title(f"{theorem}, $\\sigma$ = {sigma:g}")
            measured = "root mean square" if theorem == THEOREMS[0] else "least"
            axes.text(0.97, 0.95, measured, ha="right", va="top", transform=axes.transAxes)
        for axes in panels[-1]:
            axes.set_xlabel("K")
        for axes, place in zip(panels[:, 0], GEOMETRIES, strict=True):
            axes.set_ylabel(f"gradient norm, dual of {place}")
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4
        )
    return figure


def feedback_figure(records: Sequence[dict]) -> Figure:
    """Gradient norm against rounds: two workers with two step sizes, and three workers."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = dict(zip((2, 3), figure.subplots(1, 2), strict=True))
        for workers, axes in panels.items():
            drawn = select(records, "feedback", workers=workers)
            steps = list(dict.fromkeys(record["step_size"] for record in drawn))
            for record in drawn:
                variant, step = record["feedback"], record["step_size"]
                label = f"{VARIANT_LABELS[variant]}, step {step:g}"
                look = {"color": VARIANT_COLOURS[variant], "linestyle": LINES[steps.index(step)]}
                axes.plot(record["gradient_norms"], label=label, **look)
            axes.set(yscale="log", xlabel="round", title=f"{workers} workers")
            axes.legend()
        panels[2].set_ylabel("gradient norm")
    return figure


def valley_figure(records: Sequence[dict]) -> Figure:
    """The least value so far against rounds, a panel for each slope."""
    drawn = select(records, "valley")
    slopes = list(dict.fromkeys((record["slope"], record["beta"]) for record in drawn))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = dict(zip(slopes, figure.subplots(1, len(slopes)), strict=True))
        for (incline, beta), axes in panels.items():
            for record in select(records, "valley", slope=incline, beta=beta):
                method, schedule = record["method"], record["schedule"]
                repaired = method != "Muon"
                place = [r["schedule"] for r in drawn[:3]].index(schedule)
                look = {"color": COLOURS[0] if repaired else COLOURS[1], "linestyle": LINES[place]}
                label = f"{method}, {schedule}"
                axes.plot(record["rounds"], record["least_value"], label=label, **look)
            title = f"slope {incline:g}, $\\beta$ = {beta:g}"
            axes.set(xscale="log", yscale="log", xlabel="round", title=title)
            axes.axhline(2 * incline, color="#777777", linewidth=0.8)
        panels[slopes[0]].set_ylabel("least f so far")
        panels[slopes[0]].legend(loc="lower left")
    return figure


def draw(records: Sequence[dict], directory: Path) -> None:
    """Write README.md and the pictures, which follow from the records alone."""
    (directory / "README.md").write_text(report(records))
    save(bounds_figure(records), directory / "bounds")
    save(feedback_figure(records), directory / "feedback")
    save(valley_figure(records), directory / "lipschitz")
