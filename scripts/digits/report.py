"""README.md and the picture of `scripts/digits/run.py`, from its records alone."""

import textwrap
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from scripts.measuring import markdown
from training.drawing import Figure, matplotlib
from training.picture import COLOURS, STYLE, save

TEXT = Path(__file__).with_name("report.md")
NAMES = {
    "without": "Muon",
    "with": "Muon with error feedback",
    "gradient descent": "gradient descent with momentum",
}


def select(records: Sequence[dict], stage: str, method: str) -> list[dict]:
    return [one for one in records if (one["stage"], one["method"]) == (stage, method)]


def with_spread(values: Sequence[float], digits: int, scale: float = 1) -> str:
    """Their mean and one standard deviation."""
    return f"{scale * mean(values):.{digits}f} ± {scale * stdev(values):.{digits}f}"


def final_table(records: Sequence[dict]) -> str:
    """Of every method its best point, and the mean of its seeds at the end."""
    rows = [
        ["hidden layers", "radius", "momentum", "training loss", "test loss", "test accuracy, %"]
    ]
    for method, name in NAMES.items():
        runs = select(records, "final", method)
        training, loss, accuracy = (
            [one[key] for one in runs] for key in ("train_loss", "test_loss", "test_accuracy")
        )
        point = [f"{runs[0]['radius']:g}", f"{1 - runs[0]['beta']:g}"]
        rows.append(
            [
                name,
                *point,
                with_spread(training, 4),
                with_spread(loss, 4),
                with_spread(accuracy, 2, scale=100),
            ]
        )
    return markdown(rows, text_columns=1)


def grid_table(records: Sequence[dict]) -> str:
    """Validation losses, means over seeds."""
    rows = [["hidden layers", "radius", *(f"momentum {1 - beta:g}" for beta in betas(records))]]
    for method, name in NAMES.items():
        for radius in radii(records, method):
            losses = [validation(records, method, radius, beta) for beta in betas(records)]
            cells = ["diverged" if loss is None else f"{loss:.4f}" for loss in losses]
            rows.append([name, f"{radius:g}", *cells])
    return markdown(rows, text_columns=1)


def betas(records: Sequence[dict]) -> list[float]:
    return sorted({one["beta"] for one in records})


def radii(records: Sequence[dict], method: str) -> list[float]:
    return sorted({one["radius"] for one in select(records, "grid", method)})


def validation(records: Sequence[dict], method: str, radius: float, beta: float) -> float | None:
    """The mean validation loss of a point; None where a seed diverged."""
    losses = [
        one["validation_loss"]
        for one in select(records, "grid", method)
        if (one["radius"], one["beta"]) == (radius, beta)
    ]
    return None if None in losses else mean(losses)


def headline(records: Sequence[dict]) -> str:
    """What feedback costs, or gains, with the same seeds."""
    without, with_ = (
        {one["seed"]: one for one in select(records, "final", method)}
        for method in ("without", "with")
    )
    losses, accuracies = (
        [with_[seed][key] - without[seed][key] for seed in without]
        for key in ("test_loss", "test_accuracy")
    )
    share = mean(losses) / mean(one["test_loss"] for one in without.values())
    errors = [stdev(changes) / sqrt(len(changes)) for changes in (losses, accuracies)]
    sentence = (
        f"With error feedback Muon's test loss changes by {mean(losses):+.4f} ± {errors[0]:.4f} "
        f"nats ({share:+.0%}), its accuracy by {100 * mean(accuracies):+.2f} ± "
        f"{100 * errors[1]:.2f} points (± is the standard error over {len(losses)} seeds)."
    )
    return textwrap.fill(sentence, 100)


def report(records: Sequence[dict]) -> str:
    """report.md with tables and numbers from the records. Its words were written by them."""
    return TEXT.read_text().format(
        headline=headline(records),
        finals=final_table(records),
        grid=grid_table(records),
        seeds=len(select(records, "final", "with")),
    )


def picture(records: Sequence[dict]) -> Figure:
    """Validation loss against radius, at each momentum, and test loss against steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (method, name), colour in zip(NAMES.items(), COLOURS, strict=False):
            for beta, line in zip(betas(records), ("-", "--"), strict=True):
                places = radii(records, method)
                losses = [validation(records, method, radius, beta) for radius in places]
                label = f"{name}, momentum {1 - beta:g}"
                left.plot(places, losses, line, marker="o", color=colour, label=label)
            curves = [one["curve"] for one in select(records, "final", method)]
            means = [mean(values) for values in zip(*curves, strict=True)]
            right.plot(range(10, 101, 10), means, marker="o", color=colour, label=name)
        left.set(xscale="log", yscale="log", xlabel="radius", ylabel="validation loss, nats")
        right.set(yscale="log", xlabel="% of the steps", ylabel="test loss, nats, mean of seeds")
        left.legend(fontsize=7)
        right.legend()
    return figure


def draw(records: Sequence[dict], directory: Path) -> None:
    """Write README.md and the picture."""
    (directory / "README.md").write_text(report(records))
    save(picture(records), directory / "digits")
