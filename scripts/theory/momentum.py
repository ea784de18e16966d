"""Gradient norms against the horizon by kind of momentum: `python scripts/theory/momentum.py`.

A single worker, uncompressed, on the function of the second theorem (`Rippled`, spectral norm) with
noise that changes with X, so that two gradients of one sample do not differ by the exact amount:

    grad f(X; xi, D) = grad f(X) + xi + D * X,   xi and D Gaussian, entry by entry

Every horizon K has its own parameters, of the orders that the rates ask for: beta = K^(-1/2) and
steps of length ETA K^(-3/4) for Polyak's momentum (rate K^(-1/4)), beta = K^(-2/3) and ETA K^(-2/3)
for the corrected ones (K^(-1/3)). The records go to momentum.jsonl in --out, and from them come
momentum.md and momentum.png.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon import EF21Muon
from scripts.measuring import markdown
from scripts.theory.algorithm import gradient_norms
from scripts.theory.problems import Rippled, geometry
from scripts.theory.run import read
from training.config import ROOT
from training.drawing import Figure, matplotlib
from training.picture import STYLE, line_look, save

SIDE, REPLICAS = 4, 16
HORIZONS = (64, 256, 1024, 4096, 16384)
SIGMA, OF_CURVATURE, ETA = 1.0, 0.5, 1.0
ORDERS = {"polyak": (1 / 2, 3 / 4, 1 / 4)} | dict.fromkeys(
    ("mvr", "hessian"), (2 / 3, 2 / 3, 1 / 3)
)


def problem() -> Rippled:
    random = torch.Generator().manual_seed(0)
    return Rippled(
        torch.ones(1, dtype=torch.float64),
        torch.randn(1, SIDE, SIDE, generator=random, dtype=torch.float64),
    )


def mean_gradient_norm(kind: str, rounds: int, seed: int = 0) -> float:
    """The mean of ||grad f(X^k)||_* over k < K and replicas."""
    of_beta, of_step, _ = ORDERS[kind]
    place, function = geometry("spectral", SIDE, SIDE), problem()
    layers = [torch.nn.Parameter(torch.zeros(SIDE, SIDE)) for _ in range(REPLICAS)]
    optimizer = EF21Muon(
        layers,
        lr=ETA * rounds**-of_step,
        momentum=1 - rounds**-of_beta,
        momentum_kind=kind,
        norm=place.norm,
    )
    random = torch.Generator().manual_seed(seed)
    models = []
    for _ in range(rounds):
        noise, curvature = torch.randn(2, REPLICAS, SIDE, SIDE, generator=random)

        def closure(noise=noise, curvature=curvature) -> None:
            points = torch.stack([layer.detach() for layer in layers])
            gradients = function.gradients(points)[0].float()
            gradients += SIGMA / SIDE * noise + OF_CURVATURE * curvature * points
            for layer, gradient in zip(layers, gradients, strict=True):
                layer.grad = gradient

        models.append(torch.stack([layer.detach().clone() for layer in layers]))
        optimizer.step(closure)
    return float(gradient_norms(function, place.norm, torch.stack(models)).mean())


def all_records() -> Iterator[dict]:
    for kind in ORDERS:
        for rounds in HORIZONS:
            measured = mean_gradient_norm(kind, rounds)
            yield {"momentum": kind, "rounds": rounds, "measured": measured}


def slope(points: Sequence[dict]) -> float:
    """d log measured / d log K over all horizons, by least squares."""
    x = torch.tensor([log(point["rounds"]) for point in points], dtype=torch.float64)
    y = torch.tensor([log(point["measured"]) for point in points], dtype=torch.float64)
    x -= x.mean()
    return float((x * y).sum() / x.square().sum())


def report(records: Sequence[dict]) -> str:
    """momentum.md."""
    rows = [["momentum", *(f"K = {rounds}" for rounds in HORIZONS), "slope", "rate"]]
    for kind, (_, _, rate) in ORDERS.items():
        points = [one for one in records if one["momentum"] == kind]
        measured = (f"{point['measured']:.3f}" for point in points)
        rows.append([kind, *measured, f"{slope(points):.2f}", f"-{rate:.2f}"])
    return f"""# Kinds of momentum, measured

`python scripts/theory/momentum.py`, two minutes. The mean of ||grad f(X^k)||_* over k < K, means of
{REPLICAS} replicas; the slope is that of log against log K over all horizons. The corrected ones
take two gradients per step.

![Gradient norms against the horizon](momentum.png)

{markdown(rows, text_columns=1)}
"""


def figure(records: Sequence[dict]) -> Figure:
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(6, 4), layout="constrained")
        axes = drawing.subplots()
        for index, (kind, (_, _, rate)) in enumerate(ORDERS.items()):
            points = [one for one in records if one["momentum"] == kind]
            rounds = [one["rounds"] for one in points]
            axes.plot(rounds, [one["measured"] for one in points], label=kind, **line_look(index))
            last = points[-1]["measured"]
            promised = [last * (k / rounds[-1]) ** -rate for k in rounds]
            axes.plot(rounds, promised, color="#777777", linestyle=":", linewidth=0.9)
        axes.set(xscale="log", yscale="log", xlabel="K", ylabel="mean gradient norm, nuclear")
        axes.legend()
    return drawing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "theory")
    parser.add_argument("--redraw", action="store_true", help="from DIR/momentum.jsonl, no runs")
    options = parser.parse_args(arguments)
    log_file = options.out / "momentum.jsonl"
    if not options.redraw:
        torch.set_num_threads(1)
        lines = [json.dumps(record) + "\n" for record in all_records()]
        log_file.write_text("".join(lines))
    records = read(log_file)
    (options.out / "momentum.md").write_text(report(records))
    save(figure(records), options.out / "momentum")
    print(report(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
