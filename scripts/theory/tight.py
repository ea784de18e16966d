"""One agent on its worst functions beside tight rates: `python scripts/theory/tight.py`.

EF, EF21 and compressed gradient descent (CGD), as `EF21Muon` with the Euclidean norm takes them, on
functions of curvature between mu and L with compressors of ||C(x) - x||^2 <= eps ||x||^2:

    EF     c = C(e + step g);  x <- x - c;  e <- e + step g - c
    EF21   x <- x - step d;  d <- d + C(g - d)
    CGD    x <- x - step C(g)

What falls is V = ||x - x* - e||^2 + ||e||^2 / s, ||g - d||^2 + s ||g||^2 and f - f*, s = sqrt(eps).

The rates are those of Thomsen, Taylor and Dieuleveut (arXiv:2506.05271) as their published
certificates have them (DanielBergThomsen/error-feedback-tight); the paper itself was not at hand.
`measured` is how V falls a round in long runs on the parabola of curvature mu or L with C(x) =
(1 - s) x or (1 + s) x, whichever is worst; `searched` the largest V' / V of one round over
quadratics and all compressors. The records go to tight.jsonl in --out, and from them come tight.md
and tight.png. A minute.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from math import log, pi, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon import EF21Muon
from ef21_muon.compressors import Identity
from ef21_muon.norms import AdaptiveRadius, Euclidean
from scripts.measuring import markdown
from scripts.theory.run import read
from training.config import ROOT
from training.drawing import Figure, matplotlib
from training.picture import STYLE, line_look, save

METHODS = {"EF": "ef14", "EF21": "ef21", "CGD": "none"}
KAPPAS = (2, 10, 100)  # L / mu; L = 1
EPSILONS = (0.01, 0.09, 0.25, 0.49, 0.81)
SWEPT = (10, 0.25)  # kappa and epsilon of the second panel
STEPS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.03, 1.06, 1.1)  # times the best
ROUNDS, LARGEST, SMALLEST = 400, 1e12, 1e-12


class Scaled(Identity):
    """C(x) = factor x."""

    lossless = False

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        return super().decode(payload, m, n) * self.factor


def best_step(method: str, kappa: float, epsilon: float) -> float:
    """The step for which the published rate is, L = 1."""
    s, mu = sqrt(epsilon), 1 / kappa
    if method == "CGD":
        return 2 / ((1 + s) + (1 - s) * mu)
    return 2 / (1 + mu) * (1 - s) / (1 + s)


def published(method: str, kappa: float, epsilon: float) -> float:
    """The rate at which V falls a round with that step."""
    s, mu = sqrt(epsilon), 1 / kappa
    if method == "CGD":
        effective = kappa * (1 + s) / (1 - s)
        return ((effective - 1) / (effective + 1)) ** 2
    root = sqrt((1 - mu) ** 2 + 16 * mu * s / (1 + s) ** 2)
    weight = best_step(method, kappa, epsilon) / (1 + mu) * ((1 - s) * (1 - mu) + (1 + s) * root)
    return s + (1 + s) * (1 - mu) * weight / 4


def measured(method: str, kappa: float, epsilon: float, step: float) -> float:
    """V' / V a round over the later half of a run, on the worst of four; more than 1 diverges."""
    curvatures = torch.tensor([1 / kappa, 1.0] * 2)
    layers = [torch.nn.Parameter(torch.ones(1, 1)) for _ in curvatures]
    groups = [
        {"params": layers[2 * i : 2 * i + 2], "w2s": Scaled(1 + sign * sqrt(epsilon))}
        for i, sign in enumerate((-1, 1))
    ]
    optimizer = EF21Muon(
        groups,
        lr=1.0,
        momentum=0,
        norm=Euclidean(),
        radius=AdaptiveRadius(1 / step, 0.0),
        feedback=METHODS[method],
    )
    points = []
    for _ in range(ROUNDS):
        for layer, curvature in zip(layers, curvatures, strict=True):
            layer.grad = curvature * layer.detach()
        optimizer.step()
        points.append(torch.cat(layers).detach().abs().flatten().double())
        if not SMALLEST < points[-1].max() < LARGEST:
            break
    # Two rounds together, since a round may go through zero.
    sizes = torch.stack(points).square().unfold(0, 2, 1).sum(-1)
    half = len(sizes) // 2
    return float((sizes[-1].max() / sizes[half].max()) ** (1 / (len(sizes) - 1 - half)))


def searched(method: str, kappa: float, epsilon: float, step: float) -> float:
    """The largest V' / V of a round.

    Of EF and EF21 what compression leaves has any direction in V' = a form of what was to be sent
    and ||rest||^2 <= eps ||sent||^2, so curvatures come apart: for each of them the largest
    eigenvalue of two forms in two numbers. Of CGD by a grid over two dimensions.
    """
    s = sqrt(epsilon)
    if method == "CGD":
        return _searched_plane(kappa, s, step)
    largest = 0.0
    for h in np.linspace(1 / kappa, 1, 200):
        if method == "EF":  # in x - x* and e
            before = [(1, (1, -1)), (1 / s, (0, 1))]
            after = [(1, (1 - step * h, -1)), (s, (step * h, 1))]
        else:  # in g and d
            before = [(1, (1, -1)), (s, (1, 0))]
            after = [(s * s, (1, -step * h - 1)), (s, (1, -step * h))]
        forms = [sum(w * np.outer(v, v) for w, v in form) for form in (before, after)]
        largest = max(largest, np.linalg.eigvals(np.linalg.solve(*forms)).real.max())
    return float(largest)


def _searched_plane(kappa: float, s: float, step: float) -> float:
    """Of curvatures mu and L, all gradients, and all errors of the largest size."""
    curvatures = np.array([1 / kappa, 1.0])
    angles = np.linspace(0, 2 * pi, 721)
    gradient = np.stack([np.cos(angles), np.sin(angles)])[:, :, None]
    error = s * np.stack([np.cos(angles), np.sin(angles)])[:, None, :]
    inverse = (1 / curvatures)[:, None, None]
    moved = inverse * gradient - step * (gradient + error)
    after, before = ((x**2 / inverse).sum(0) for x in (moved, inverse * gradient))
    return float((after / before).max())


def all_records() -> Iterator[dict]:
    for method in METHODS:
        for kappa in KAPPAS:
            for epsilon in EPSILONS:
                place = {"method": method, "kappa": kappa, "epsilon": epsilon}
                step = best_step(**place)
                rates = {
                    "published": published(**place),
                    "searched": searched(**place, step=step),
                    "measured": measured(**place, step=step),
                }
                yield {"record": "rate", **place, "step": step, **rates}
        place = dict(zip(("method", "kappa", "epsilon"), (method, *SWEPT), strict=True))
        for factor in STEPS:
            step = factor * best_step(**place)
            yield {
                "record": "sweep",
                **place,
                "step": step,
                "measured": measured(**place, step=step),
            }
    # The step of the code that came with the paper, which is none of the rate.
    place = dict(zip(("kappa", "epsilon"), SWEPT, strict=True))
    step = 2 / ((1 + sqrt(SWEPT[1])) * (1 + 1 / SWEPT[0]))
    found = measured("CGD", **place, step=step)
    yield {"record": "code", "method": "CGD", **place, "step": step, "measured": found}


def rates_table(records: Sequence[dict]) -> str:
    heading = ["kappa", "eps", "step L", "published", "EF: searched", "measured"]
    heading += ["EF21: searched", "measured", "CGD: step L", "published", "searched", "measured"]
    rows = [heading]
    for kappa in KAPPAS:
        for epsilon in EPSILONS:
            row = [str(kappa), f"{epsilon:g}"]
            for method in METHODS:
                one = of(records, method, kappa, epsilon)
                if method != "EF21":  # which has those of EF
                    row += [f"{one['step']:.3f}", f"{one['published']:.4f}"]
                row += [f"{one['searched']:.4f}", f"{one['measured']:.4f}"]
            rows.append(row)
    return markdown(rows, text_columns=0)


def of(records: Sequence[dict], method: str, kappa: float, epsilon: float) -> dict:
    """The rate record."""
    (found,) = (
        r
        for r in records
        if (r["record"], r["method"], r["kappa"], r["epsilon"]) == ("rate", method, kappa, epsilon)
    )
    return found


def report(records: Sequence[dict]) -> str:
    """tight.md."""
    rates = [one for one in records if one["record"] == "rate"]
    (code,) = (one for one in records if one["record"] == "code")
    off = max(abs(one["measured"] - one["published"]) for one in rates)
    digits = {method: -log(10) / log(of(records, method, *SWEPT)["measured"]) for method in METHODS}
    text = f"""With the best steps EF and EF21 fall at the same rate, and CGD falls faster. Of
kappa = {SWEPT[0]} and eps = {SWEPT[1]:g} a digit of V takes {digits["EF"]:.1f},
{digits["EF21"]:.1f} and {digits["CGD"]:.1f} rounds. Measured rates are within {off:.0e} of the
published ones: parabolas, and compressors that only shrink or stretch, are the worst that there is.
The search, over quadratics and all compressors, found no round that does worse. For EF that is a
proof, up to the grid of curvatures, since a gradient of any such function is one of a quadratic;
EF21 sees two, and of CGD the quadratics have two dimensions.

For CGD the step is 2 / ((1 + s) L + (1 - s) mu), of gradient descent with a relative error s. The
code that came with the paper has 2 / ((1 + s) (L + mu)), with which {code["measured"]:.4f} is
measured at kappa = {SWEPT[0]}, eps = {SWEPT[1]:g}, where the rate is
{published("CGD", *SWEPT):.4f}.

One agent needs no feedback: what it is for are several, of whom each compresses its own gradient
([Feedback](README.md#feedback)), where CGD does not converge."""
    paragraphs = "\n\n".join(textwrap.fill(part, 100) for part in text.split("\n\n"))
    return f"""# Tight rates of error feedback, measured

`python scripts/theory/tight.py`, a minute. How a Lyapunov function falls a round, one agent, of
L-smooth and mu-strongly convex functions (kappa = L / mu) and compressors with ||C(x) - x||^2 <=
eps ||x||^2: as published (arXiv:2506.05271, by its code's certificates), as the largest of one
round that a search found, and as `EF21Muon` runs on its worst parabola. The functions V and the
methods are described at the head of the script; s = sqrt(eps).

![Rates against eps, and against the step](tight.png)

{rates_table(records)}

{paragraphs}
"""


def figure(records: Sequence[dict]) -> Figure:
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(10, 4), layout="constrained")
        by_epsilon, by_step = drawing.subplots(1, 2)
        grid = np.linspace(0.001, 0.95, 200)
        for index, method in enumerate(METHODS):
            look = line_look(index)
            for kappa in KAPPAS:
                points = [of(records, method, kappa, epsilon) for epsilon in EPSILONS]
                by_epsilon.plot(
                    EPSILONS,
                    [1 - one["measured"] for one in points],
                    **(look | {"linestyle": ""}),
                    label=method if kappa == KAPPAS[0] else None,
                    markersize=4 + 3 * (method == "EF"),
                    fillstyle="none" if method == "EF" else "full",
                )
                curve = [1 - published(method, kappa, epsilon) for epsilon in grid]
                by_epsilon.plot(grid, curve, color=look["color"], linewidth=0.8)
            sweep = [r for r in records if (r["record"], r["method"]) == ("sweep", method)]
            by_step.plot(
                [one["step"] for one in sweep],
                [one["measured"] for one in sweep],
                label=method,
                **look,
            )
            best = of(records, method, *SWEPT)
            by_step.plot(best["step"], best["published"], marker="*", color="black", zorder=5)
        by_epsilon.set(
            yscale="log", xlabel="eps", ylabel="1 - rate", title="measured, and published (lines)"
        )
        for kappa in KAPPAS:
            by_epsilon.annotate(f"kappa {kappa}", (0.6, 1.3 * (1 - published("CGD", kappa, 0.6))))
        by_epsilon.legend(fontsize=7, loc="lower left")
        by_step.axhline(1, color="#777777", linestyle="--", linewidth=0.8)
        by_step.set(
            xlabel="step L",
            ylabel="rate",
            ylim=(0.85, 1.1),
            title=f"kappa {SWEPT[0]}, eps {SWEPT[1]:g} (stars: published)",
        )
        by_step.legend(fontsize=7)
    return drawing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "theory")
    parser.add_argument("--redraw", action="store_true", help="from DIR/tight.jsonl, no runs")
    options = parser.parse_args(arguments)
    log_file = options.out / "tight.jsonl"
    if not options.redraw:
        torch.set_num_threads(1)
        log_file.write_text("".join(json.dumps(record) + "\n" for record in all_records()))
    records = read(log_file)
    (options.out / "tight.md").write_text(report(records))
    save(figure(records), options.out / "tight")
    print(report(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
