"""Run EF21-Muon on problems with known constants and draw it beside the bounds of its theorems.

    python scripts/theory/run.py [--out DIR] [--redraw]

The records of `scripts.theory.studies` go to theory.jsonl in DIR, and from them come README.md and
bounds.png. A few minutes.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import log
from pathlib import Path

import numpy as np
import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.studies import command, fill, markdown, select
from scripts.theory import studies
from training.config import ROOT
from training.picture import COLOURS, panels

TEXT = Path(__file__).with_name("report.md")


def measure(options: object = None) -> Iterator[dict]:
    """Run all studies."""
    torch.set_num_threads(1)
    yield {"record": "run", "schema": 1, "torch": torch.__version__}
    for case in studies.CASES:
        yield from case.records(case.horizons)
    yield from studies.feedback_records()


def slope(points: Sequence[dict], name: str = "measured") -> float:
    """d log `name` / d log K over these horizons, by least squares."""
    logs = [(log(point["rounds"]), log(point[name])) for point in points]
    return np.polyfit(*zip(*logs, strict=True), 1)[0]


def bounds_table(records: Sequence[dict]) -> str:
    """The shortest and the longest horizon of every case, and the slopes at the end."""
    rows = [["theorem", "geometry", "noise", *2 * ["K", "measured", "bound"]]]
    rows[0] += ["slope", "of the bound"]
    for case in studies.CASES:
        points = select(records, record="bound", **asdict(case))
        row = [case.theorem, case.geometry, f"{case.sigma:g}"]
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
        name = studies.VARIANTS[record["feedback"]]
        row = [name, str(record["workers"]), f"{record['step_size']:g}"]
        row += [f"{norms[0]:.3g}", str(len(norms) - 1), f"{min(last):.2g}", f"{max(last):.2g}"]
        rows.append(row)
    return markdown(rows)


def draw(records: Sequence[dict], directory: Path) -> str:
    """Write README.md and the picture; returns the page."""
    (run,) = select(records, record="run")
    tables = {"bounds": bounds_table(records), "feedback": feedback_table(records)}
    values = run | tables | {"replicas": studies.REPLICAS}
    page = fill(TEXT.read_text(), values)
    (directory / "README.md").write_text(page)
    draw_bounds(records, directory / "bounds")
    return page


def draw_bounds(records: Sequence[dict], stem: Path) -> None:
    """Gradient norm against K, a row for each theorem, a column for each geometry and noise."""
    looks = {"bound": {"color": "#777777", "linestyle": "--"}}
    looks["measured"] = {"color": COLOURS[0], "marker": "o"}
    with panels(stem, 11, 5.5, 2, 4, sharex=True) as grid:
        for axes, case in zip(grid.flat, studies.CASES, strict=True):
            points = select(records, record="bound", **asdict(case))
            for name, look in looks.items():
                rounds, norms = ([point[key] for point in points] for key in ("rounds", name))
                axes.plot(rounds, norms, label=name, **look)
            axes.set(xscale="log", yscale="log", title=f"{case.geometry}, noise {case.sigma:g}")
        for axes, theorem in zip(grid[:, 0], studies.THEOREMS, strict=True):
            axes.set_ylabel(f"gradient norm, {theorem}")
        for axes in grid[-1]:
            axes.set_xlabel("K")
        grid[0, 0].legend()


def main(arguments: Sequence[str] | None = None) -> int:
    log = ROOT / "results" / "theory" / "theory.jsonl"
    return command(__doc__, log, measure, draw, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
