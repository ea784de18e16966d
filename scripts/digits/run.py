"""Muon with and without error feedback of its steps, on images: `python scripts/digits/run.py`.

A small convolutional net learns the 1,797 digits of 8 x 8 pixels that scikit-learn ships (install
`.[digits]`). Hidden layers take steps by one of METHODS, all others Scion's. Every method gets the
same number of radii and momenta; of each the pair with the lowest validation loss, the mean of two
seeds, is trained from thirty others. The records go to digits.jsonl in --out, and from them comes
README.md (--redraw).
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from math import inf, isfinite, sqrt
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon import EF21Muon, param_groups
from ef21_muon.norms import AdaptiveRadius, Euclidean
from scripts.studies import command, fill, markdown, page, select
from training.config import ROOT

TEXT = Path(__file__).with_name("report.md")
STEPS, BATCH, LR = 300, 64, 0.02
HEAD, BIASES = 20.0, 0.25  # the radii of what is not hidden, for all methods
PARTS = {"train": 1077, "validation": 360, "test": 360}  # images
METHODS = {
    "without": "Muon",
    "with": "Muon with error feedback",
    "gradient descent": "gradient descent with momentum",
}
BETAS = (0.1, 0.5)
SMALL, LARGE = (0.5, 1.0, 2.0, 4.0, 8.0), (16.0, 32.0, 64.0, 128.0, 256.0)
RADII = {"without": SMALL, "with": LARGE, "gradient descent": LARGE}  # of hidden layers
TUNING_SEEDS, SEEDS = (0, 1), range(10, 40)

Images = tuple[Tensor, Tensor]  # pixels (N, 1, 8, 8) from 0 to 1, and which digit each is (N,)


def net() -> nn.Sequential:
    """Three convolutions, a hidden layer and a head, 37,070 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(512, 44), nn.ReLU(), nn.Linear(44, 10)),
    )


def build(model: nn.Sequential, method: str, radius: float, beta: float) -> EF21Muon:
    """One worker, uncompressed; the method is that of hidden layers.

    "gradient descent" takes the step lr radius M, of which "with" takes the part along the LMO's
    direction and keeps the rest for later.
    """
    plain = {"norm": Euclidean(), "radius": AdaptiveRadius(l0=1 / radius, l1=0)}
    plain["conv_scaling"] = False
    of_method = {"without": {}, "with": {"lmo_feedback": True}, "gradient descent": plain}[method]
    groups = param_groups(model, "scion", roles={"10.weight": "embedding"})
    for group in groups:
        group["radius"] = {"embedding": HEAD, "vector": BIASES}.get(group["name"], radius)
        if group["name"] == "hidden":
            group |= of_method
    return EF21Muon(groups, lr=LR, momentum=1 - beta)


def train(
    parts: dict[str, Images], method: str, radius: float, beta: float, seed: int, steps: int = STEPS
) -> dict:
    """Train a net from a seed; the lr falls to 0 on a line. Returns what its record says."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = net()
    optimizer = build(model, method, radius, beta)
    pixels, digits = parts["train"]
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        if len(order) < BATCH:
            order = torch.randperm(len(digits), generator=random)
        chosen, order = order.split([BATCH, len(order) - BATCH])
        optimizer.zero_grad()
        functional.cross_entropy(model(pixels[chosen]), digits[chosen]).backward()
        optimizer.step()
    record = {"method": method, "radius": radius, "beta": beta, "seed": seed}
    for part, images in parts.items():
        record[f"{part}_loss"], record[f"{part}_accuracy"] = measured(model, images)
    return record


@torch.no_grad()
def measured(model: nn.Module, images: Images) -> tuple[float | None, float]:
    """The mean loss in nats per image, None if it is not finite, and the accuracy."""
    pixels, digits = images
    scores = model(pixels)
    accuracy = (scores.argmax(1) == digits).float().mean()
    loss = float(functional.cross_entropy(scores, digits))
    return loss if isfinite(loss) else None, float(accuracy)


def read_images() -> dict[str, Images]:
    """The digits in PARTS, always the same. Raises ValueError where scikit-learn is not there."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed: run "
            "pip install -c constraints.txt '.[digits]'"
        ) from None
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(data.images / 16).float()[order, None]
    digits = torch.from_numpy(data.target)[order]
    sizes = list(PARTS.values())
    parts = zip(pixels.split(sizes), digits.split(sizes), strict=True)
    return dict(zip(PARTS, parts, strict=True))


def all_records(parts: dict[str, Images]) -> Iterator[dict]:
    """The grid of every method, and then its best point from other seeds."""
    torch.set_num_threads(1)
    for method, radii in RADII.items():
        grid = []
        for radius, beta, seed in product(radii, BETAS, TUNING_SEEDS):
            grid.append({"stage": "grid", **train(parts, method, radius, beta, seed)})
            yield grid[-1]
        best = min(product(radii, BETAS), key=lambda at, grid=grid: validation(grid, *at) or inf)
        for seed in SEEDS:
            yield {"stage": "final", **train(parts, method, *best, seed)}


def validation(grid: Sequence[dict], radius: float, beta: float) -> float | None:
    """The mean validation loss at a point of a method's grid; None where a seed diverged."""
    losses = [one["validation_loss"] for one in select(grid, radius=radius, beta=beta)]
    return None if None in losses else mean(losses)


def report(records: Sequence[dict]) -> str:
    """The page. Its words were written by the records."""
    finals = {method: select(records, stage="final", method=method) for method in METHODS}
    values = {"finals": final_table(finals)} | changes(finals["without"], finals["with"])
    return fill(TEXT.read_text(), values)


def final_table(finals: dict[str, list[dict]]) -> str:
    """Of every method its best point, and mean and standard deviation of its seeds at the end."""
    rows = [["hidden layers", "radius", "momentum"]]
    rows[0] += ["training loss", "test loss", "test accuracy, %"]
    for method, runs in finals.items():
        row = [METHODS[method], f"{runs[0]['radius']:g}", f"{1 - runs[0]['beta']:g}"]
        for key in ("train_loss", "test_loss"):
            losses = [one[key] for one in runs]
            row.append(f"{mean(losses):.4f} ± {stdev(losses):.4f}")
        percents = [100 * one["test_accuracy"] for one in runs]
        rows.append([*row, f"{mean(percents):.2f} ± {stdev(percents):.2f}"])
    return markdown(rows)


def changes(without: Sequence[dict], with_: Sequence[dict]) -> dict[str, object]:
    """What feedback costs, or gains, from the same seeds; ± is the standard error over them."""

    def change(key: str, scale: float, digits: int) -> str:
        found = [scale * (b[key] - a[key]) for a, b in zip(without, with_, strict=True)]
        error = stdev(found) / sqrt(len(found))
        return f"{mean(found):+.{digits}f} ± {error:.{digits}f}"

    losses, accuracies = change("test_loss", 1, 4), change("test_accuracy", 100, 2)
    before, after = (mean(one["test_loss"] for one in runs) for runs in (without, with_))
    share = f"{after / before - 1:+.0%}"
    return {"loss": losses, "share": share, "accuracy": accuracies, "seeds": len(with_)}


def main(arguments: Sequence[str] | None = None) -> int:
    log = ROOT / "results" / "digits" / "digits.jsonl"
    measure, draw = lambda _: all_records(read_images()), page(report)
    return command(__doc__, log, measure, draw, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
