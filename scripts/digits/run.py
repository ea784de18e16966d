"""Muon with and without error feedback of its steps, on images: `python scripts/digits/run.py`.

A small convolutional net learns the 1,797 digits of 8 x 8 pixels that scikit-learn ships (install
`.[digits]`). Hidden layers take steps by one of METHODS, all others Scion's. Every method gets the
same number of radii and momenta; of each the pair with the lowest validation loss, the mean of two
seeds, is trained from ten others. The records go to digits.jsonl in --out, and from them come
README.md and digits.png (--redraw).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon import EF21Muon, param_groups
from ef21_muon.norms import AdaptiveRadius, Euclidean
from scripts.digits.report import draw, select, validation
from training.config import ROOT

STEPS, BATCH, LR = 300, 64, 0.02
HEAD, BIASES = 20.0, 0.25  # the radii of what is not hidden, for all methods
PARTS = {"train": 1077, "validation": 360, "test": 360}  # images
BETAS = (0.1, 0.5)
RADII = {  # of hidden layers
    "without": (0.5, 1.0, 2.0, 4.0, 8.0),
    "with": (16.0, 32.0, 64.0, 128.0, 256.0),
    "gradient descent": (16.0, 32.0, 64.0, 128.0, 256.0),
}
METHODS = tuple(RADII)
TUNING_SEEDS, SEEDS = (0, 1), tuple(range(10, 40))


@dataclass(frozen=True)
class Images:
    """Pixels (N, 1, 8, 8) from 0 to 1, and which digit each is (N,)."""

    pixels: Tensor
    digits: Tensor


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
    groups = param_groups(model, "scion", roles={"10.weight": "embedding"})
    for group in groups:
        group["radius"] = {"embedding": HEAD, "vector": BIASES}.get(group["name"], radius)
        if group["name"] == "hidden":
            group |= {
                "without": {},
                "with": {"lmo_feedback": True},
                "gradient descent": {
                    "norm": Euclidean(),
                    "radius": AdaptiveRadius(l0=1 / radius, l1=0),
                    "conv_scaling": False,
                },
            }[method]
    return EF21Muon(groups, lr=LR, momentum=1 - beta)


def train(
    parts: dict[str, Images], method: str, radius: float, beta: float, seed: int, steps: int = STEPS
) -> dict:
    """Train a net from a seed; the lr falls to 0 on a line. Returns what its record says."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = net()
    optimizer = build(model, method, radius, beta)
    images, curve = parts["train"], []
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        if len(order) < BATCH:
            order = torch.randperm(len(images.digits), generator=random)
        chosen, order = order.split([BATCH, len(order) - BATCH])
        optimizer.zero_grad()
        functional.cross_entropy(model(images.pixels[chosen]), images.digits[chosen]).backward()
        optimizer.step()
        if (step + 1) % (steps // 10) == 0:
            curve.append(measured(model, parts["test"])[0])
    record = {"method": method, "radius": radius, "beta": beta, "seed": seed, "curve": curve}
    for part, images in parts.items():
        record[f"{part}_loss"], record[f"{part}_accuracy"] = measured(model, images)
    return record


@torch.no_grad()
def measured(model: nn.Module, images: Images) -> tuple[float | None, float]:
    """The mean loss in nats per image, None if it is not finite, and the accuracy."""
    scores = model(images.pixels)
    accuracy = (scores.argmax(1) == images.digits).float().mean()
    loss = float(functional.cross_entropy(scores, images.digits))
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
    return dict(zip(PARTS, (Images(*part) for part in parts), strict=True))


def best(records: Sequence[dict], method: str) -> tuple[float, float]:
    """Of the grid, the radius and beta with the lowest mean validation loss."""
    points = {(one["radius"], one["beta"]) for one in select(records, "grid", method)}
    losses = {point: validation(records, method, *point) for point in sorted(points)}
    return min((point for point in losses if losses[point] is not None), key=losses.get)


def all_records(parts: dict[str, Images]) -> Iterator[dict]:
    """The grid of every method, and then its best point from other seeds."""
    for method in METHODS:
        grid = []
        for radius in RADII[method]:
            for beta in BETAS:
                for seed in TUNING_SEEDS:
                    found = train(parts, method, radius, beta, seed)
                    grid.append({"stage": "grid", **found})
                    yield grid[-1]
        for seed in SEEDS:
            yield {"stage": "final", **train(parts, method, *best(grid, method), seed)}


def read(log_file: Path) -> list[dict]:
    """The records of a digits.jsonl."""
    return [json.loads(line) for line in log_file.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "digits")
    parser.add_argument("--redraw", action="store_true", help="from DIR/digits.jsonl, no runs")
    options = parser.parse_args(arguments)
    log_file = options.out / "digits.jsonl"
    torch.set_num_threads(1)
    try:
        if not options.redraw:
            parts = read_images()
            options.out.mkdir(parents=True, exist_ok=True)
            with log_file.open("w") as file:
                for record in all_records(parts):
                    file.write(json.dumps(record) + "\n")
                    file.flush()
        draw(read(log_file), options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
