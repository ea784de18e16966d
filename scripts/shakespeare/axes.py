"""How figures of the study are drawn: panels, lines with bands, bars, scales and legends."""

from collections.abc import Sequence
from statistics import mean

from scripts.shakespeare.results import LOCAL, PEERS, Line, Result, Results
from training.drawing import Figure, NullLocator
from training.picture import line_look, plain_sizes

LOSS, LOSS_GAP = "test loss (nats per token)", "loss gap (%)"


def panels(width: float, height: float, count: int = 1, **options) -> tuple[Figure, Sequence]:
    """A figure, and its panels from left to right."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def legend_outside(figure: Figure, axes, **options) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", **options)


def level(axes, value: float) -> None:
    """A thin line across."""
    axes.axhline(value, color="#888888", linewidth=0.8)


def line(axes, points: Line, index: int, label: str) -> None:
    axes.plot(*zip(*points, strict=True), label=label, **line_look(index))


def gaps_upwards(axes) -> None:
    """Loss gaps, which may be below 0, by bytes."""
    axes.set(ylabel=LOSS_GAP, xscale="log")
    axes.set_yscale("symlog", linthresh=1)
    plain_sizes(axes)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def bars(axes, rows: Sequence[tuple[str, float, str, str]]) -> None:
    """Labels, heights, what is written above them, and colours."""
    for place, (_, height, text, colour) in enumerate(rows):
        axes.bar(place, height, color=colour)
        axes.annotate(text, (place, height), ha="center", va="bottom")
    axes.set_xticks(range(len(rows)), [row[0] for row in rows], rotation=40, ha="right")
    axes.set_axisbelow(True)


def with_band(axes, one: Result, index: int, key: str, label: str | None) -> None:
    """A line for the mean over seeds, and a band from the least to the most."""
    rows = list(zip(*(log.evals for log in one.logs), strict=True))
    x = [row[0][key] if key == "tokens" else one.sizes(row[0][key]) for row in rows]
    losses = [[record["test_loss"] for record in row] for row in rows]
    look = line_look(index)
    axes.plot(x, [mean(values) for values in losses], markersize=3, label=label, **look)
    if len(one.logs) > 1:
        least, most = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between(x, least, most, color=look["color"], alpha=0.2, linewidth=0)


def by_family(results: Results) -> dict[str, list[Result]]:
    """The settings that figures of all of them show, in the study's order."""
    families: dict[str, list[Result]] = {}
    for name, one in results.items():
        if "/" not in name and one.setting.family not in ("feedback", LOCAL, *PEERS):
            families.setdefault(one.setting.family, []).append(one)
    return families
