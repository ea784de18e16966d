"""The README's picture: a line per method, the lowest test loss by the bytes that were sent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.shakespeare.results import Result, ours
from training.drawing import Figure
from training.picture import COLOURS, plain_losses, plain_sizes

Line = Sequence[tuple[float, float]]  # (bytes, test loss), from few bytes to many


@dataclass(frozen=True)
class Method:
    """What a line is of: families of the study, without one all of ours that compress.

    Its name is so many points right and up of its end.
    """

    name: str
    families: tuple[str, ...]
    colour: str
    place: tuple[int, int] = (7, 0)
    width: float = 1.8
    style: str = "-"


METHODS = (
    Method("AdamW + DDP", ("AdamW",), COLOURS[6]),
    Method("Dion", ("Dion", "Dion float32"), COLOURS[2]),
    Method("Muon +\nPowerSGD", ("Muon + PowerSGD",), COLOURS[1], (7, 8)),
    Method("Muon +\nGreedyLore", ("Muon + GreedyLore",), COLOURS[0], (7, 18), style=":"),
    Method("EF21-Muon,\nuncompressed", ("identity",), COLOURS[4], (9, 9)),
    Method("Muon + DDP", ("Muon",), COLOURS[5], (9, -10), style="--"),
    Method("DeMo", ("DeMo",), COLOURS[3], (7, 7)),
    Method("DiLoCo", ("DiLoCo",), COLOURS[1], (-24, 22), style="--"),
    Method("MuLoCo", ("MuLoCo",), COLOURS[2], style="--"),
    Method("SparseLoCo", ("SparseLoCo",), COLOURS[3], (-10, -4), style="--"),
    Method("EF21-Muon and local steps, compressed", (), COLOURS[0], (7, 0), width=3),
)
BETWEEN = 200  # places at which lines are compared, beside their own points
LOSSES = (1.28, 3.3)  # that are drawn


def envelope(lines: Sequence[Line]) -> Line:
    """The lowest loss that any line has reached with at most so many bytes; it ends at the lowest.

    Between its points a line is straight over the logarithm of bytes, which are above 0.
    """
    own = {size for line in lines for size, _ in line}
    between = np.geomspace(min(own), max(own), BETWEEN + 2)[1:-1]
    sizes = np.array(sorted(own | set(between.tolist())))
    reached = []
    for line in lines:
        of_line, losses = np.array(line).T
        reached.append(np.interp(np.log(sizes), np.log(of_line), losses, left=np.inf))
    lowest = np.minimum.accumulate(np.min(reached, axis=0))
    end = int(lowest.argmin()) + 1
    return list(zip(sizes[:end].tolist(), lowest[:end].tolist(), strict=True))


def of_method(results: dict[str, Result], method: Method) -> list[Result]:
    """The settings that its line is of."""
    if not method.families:
        return ours(results)
    return [one for one in results.values() if one.setting.family in method.families]


def envelope_of(results: dict[str, Result], method: Method) -> Line:
    """By bytes sent and received; empty where nothing has run."""
    members = of_method(results, method)
    return envelope([result.by_both for result in members]) if members else []


def ahead(results: dict[str, Result]) -> list[tuple[str, float, float]]:
    """Where another method's envelope is below ours: its name, and from which size to which."""
    sizes, losses = np.array(envelope_of(results, METHODS[-1])).T
    found = []
    for method in METHODS[:-1]:
        if method.families != ("identity",) and (line := envelope_of(results, method)):
            own, its = np.array(line).T
            ours_there = np.interp(np.log(own), np.log(sizes), losses, left=np.inf)
            if len(lower := own[its < ours_there]):
                found.append((method.name.replace("\n", " "), lower[0], lower[-1]))
    return found


def envelopes_figure(results: dict[str, Result], target: float) -> Figure:
    """The envelope of every method; at the target, by how much ours sends and receives less."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        if line := envelope_of(results, method):
            look = {"color": method.colour, "linewidth": method.width, "linestyle": method.style}
            axes.plot(*zip(*line, strict=True), **look)
            write(axes, method.name, line[-1], method.place, method.colour)
    axes.axhline(target, color="#777777", linewidth=0.8, linestyle="--", zorder=0)
    write(axes, f"target loss {target:.3f}", (0.011, target), (0, 6), "#777777")
    fewest, whole = fewest_both_ways(results, target), results["identity"].both(target)
    ends = (fewest.both(target), target), (whole, target)
    compare(axes, *ends, f"{whole / fewest.both(target):,.0f} times fewer bytes")
    axes.set(
        xlabel="x model size (fp32), that a worker sends and receives",
        ylabel="lowest test loss so far (nats per token)",
        xscale="log",
        yscale="log",
        xlim=(0.01, 2500),
        ylim=LOSSES,
    )
    plain_sizes(axes)
    plain_losses(axes)
    return figure


def fewest_both_ways(results: dict[str, Result], target: float) -> Result:
    """Of ours with seeds the one that reaches the target with the fewest bytes both ways."""
    reached = [one for one in ours(results) if one.has_seeds and one.both(target)]
    return min(reached, key=lambda one: one.both(target))


def write(axes, text: str, point: tuple, offset: tuple[int, int], colour: str) -> None:
    """A text beside a point: so many points right, or left, and up of it."""
    side = "left" if offset[0] >= 0 else "right"
    how = {"color": colour, "ha": side, "va": "center", "linespacing": 1}
    axes.annotate(text, point, offset, textcoords="offset points", **how)


def compare(axes, ours: tuple, other: tuple, text: str) -> None:
    """An arrow from fewer bytes to more, and a text above it."""
    colour = METHODS[-1].colour
    axes.annotate("", ours, other, arrowprops={"arrowstyle": "<->", "color": colour})
    write(axes, text, (ours[0] ** 0.7 * other[0] ** 0.3, ours[1]), (0, 7), colour)
