"""Tables, pictures and README.md of `scripts/theory.py`, from its records alone."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import log
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from scripts.figures import COLOURS, STYLE, save
from scripts.theory_studies import (
    CASES,
    GEOMETRIES,
    REPLICAS,
    THEOREMS,
    VARIANTS,
    WORKERS,
)

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
    """README.md: what was run, how the poster is read, and the tables."""
    return f"""# Theory

`python scripts/theory.py`, four minutes of processor time in two processes (torch
{records[0]["torch"]}); `--redraw` draws from theory.jsonl again. The theorems are numbers in
`ef21_muon/theory.py`, the problems and the proofs of their constants are in
`scripts/problems.py`.

## Measured against the bounds

![Gradient norms and bounds against the horizon](bounds.png)

{bounds_table(records)}

Four heterogeneous workers, 4 x 4 matrices, quadratics for the first theorem and functions that
are (L0, L1)-smooth but not L-smooth for the second. Measured is what a theorem bounds: the root
of the mean of E ||grad f(X^k)||_*^2 over k < K, or the least E ||grad f(X^k)||_* over k <= K.
Every K is a run with its own parameters, but for the first theorem without noise, whose
parameters do not depend on K. Expectations are means of {REPLICAS} replicas; noise is Gaussian
with E ||xi||_2^2 = noise^2. Workers send a quarter (alpha_D = 1/4); in the first theorem the
servers send x / 2 for x (alpha_P = 3/4 in every norm). Slopes are d log / d log K between the
last two horizons; the theorems promise -1/2 for the first without noise and -1/4 otherwise, as K
grows (-0.42 is on the way there; tests reach -1/2 in both geometries on smaller matrices). The
two compressors have the same alpha and the same bound. Steps as short as the theorems ask for
make them nearly the same run, too.

The lines are Algorithm 1 in one process, with the norms and compressors of the library; the
crosses are the same runs by `EF21Muon` on {WORKERS} processes, and tests hold the two against
each other iterate by iterate on two. Steps of the second theorem go eta (K + 1)^(1/4) far at
most, with eta about 0.1 here, so its problems start close to their centres.

## How the poster is read

The poster (arXiv:2510.00643) states both theorems without proofs. Let F be the unit of f, X that
of the norm and E that of the Euclidean one: L is F/X^2, the dual norm of a gradient F/X, rho
E/X.

- The noise sigma is bounded in the Euclidean norm, though A5 has the dual one: beta needs delta0
  L / (rho^2 sigma^2) to have no unit and both bounds have rho_bar sigma for a dual norm, so
  sigma is F/E. The 1/n for averaging over workers needs the Euclidean norm, too.
- The step of the first theorem, which the poster leaves out, is t^k = gamma ||G^k||_*: gamma is
  X^2/F, and a radius X. In `EF21Muon` that is radius=AdaptiveRadius(l0=1/gamma, l1=0) with lr=1.
- L_bar^0 in the first bound is L_bar: there is no (L0, L1)-smoothness in that theorem.
- The fourth term of the first bound has sigma^2 where units, and the fourth argument of beta put
  into rho_bar^2 sigma^2 beta^3 / alpha_D^2, give sigma^(2/3). In the third, K is not under the
  root.
- "eta^2 <= 1" compares a length with a number. It is kept as it stands.
- In the second bound mean_j (L_j^1)^2 (f^* - f_j^*) can be retraced where all L_j^1 are equal,
  as they are here: with others, differences f_j(X) - f^* below zero have no common factor.

## What is derived here

The first theorem is stated with O(.). `LSmooth.bound` has constants, derived in its docstring
from the descent lemma and the poster's zeta and gamma: 4 delta0 / (gamma K) without noise. Term
by term the derivation needs no more than the poster's zeta, and 12 L^2 / beta^2 in it is met
exactly. With noise it has a term that the poster's O(.) lacks, rho_bar^2 sigma^2 / (n beta K),
of the first stochastic gradients, from which all M_j start. The second bound is the poster's;
its constants can be retraced likewise, with 3 for e, the limit of (1 + 1/(K + 1))^(K + 1).

## Feedback

![Gradient norm against rounds for three variants of error feedback](feedback.png)

{feedback_table(records)}

Gradient descent (`EF21Muon` with the Euclidean norm and an adaptive radius, beta = 1, a process
a worker) on the top entries of every worker's gradient. Two workers, f_1 and f_2 quadratics of
curvature 1/2 and 3/2 with distant minimisers, 2 of 16 entries sent: without feedback it stalls
where the messages cancel and the gradients do not. EF14 ends in a neighbourhood that shrinks
with the step size, since each worker's error keeps the size of its own gradient, which is not
zero at the minimum. EF21 converges. Three workers, one of three entries sent, Beznosikov et al.
(arXiv:2002.12410): without feedback the norm grows by 1 + 11/6 step a round, for every step
size; all three gradients vanish at the minimum, so EF14 converges, too. (For two workers and top
entries alone it cannot: their mean never points uphill.)

## Muon on convex Lipschitz functions

![Least function value against rounds](lipschitz.png)

{valley_table(records)}

f(X) = |X_11 - X_22| + slope |X_11 + X_22|, minimum 0. Its subgradients are diagonal, and Muon's
step on diagonal matrices is the sign of the momentum. For slope < 2 beta - 1 the sign is +-(1,
-1) for ever, whatever the radii: X_11 + X_22 never changes and f stays above slope times its
start (the thin line; proof at `Valley` in `scripts/problems.py`). For beta <= 1/2 momentum can
average the jumps of +-1 away, so that the smaller slope shows; for beta = 0.1 and slope 0.02 it
rarely does, which is measured and not proven, and depends on the schedule. With error feedback,
e <- e + eta M - step with the step the projection on the LMO's direction, it converges.

That Muon does not converge on such functions and error feedback repairs it is the result of
Parshakova et al., "Muon Does Not Converge on Convex Lipschitz Functions" (arXiv:2605.08980);
only its abstract was at hand, so the example and the repair are ours, after Karimireddy et al.
(arXiv:1901.09847) for sign descent. By that abstract the repair makes Muon worse in practice, on
CIFAR-10 and nanoGPT, and smoothness is the better model of why Muon works.
"""


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
