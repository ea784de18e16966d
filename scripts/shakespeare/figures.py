"""Draw the study of results/shakespeare from its logs: `python scripts/shakespeare/figures.py`.

Figures go to results/shakespeare, tables and what they show in words to results/README.md, and loss
gaps to results/shakespeare/summary.json, which `dry_run=true` reads. The same logs always give the
same files.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.shakespeare import results as study
from scripts.shakespeare.page import page
from scripts.shakespeare.results import BOTH, OURS, SENT, UNCOMPRESSED, Result, Results
from scripts.shakespeare.runs import OF_WORKERS, SIZES
from training import picture
from training.drawing import EngFormatter
from training.picture import COLOURS, line_look

LOSS, LOSS_GAP = "test loss (nats per token)", "loss gap (%)"
PANELS = {  # the paper's family in its first two panels, and in its last two
    "rank": ("identity", "natural", "rank20", "rank15", "rank10", "rank5", "rank15-natural"),
    "top": ("identity", "natural", "top20", "top15", "top10", "top5", "top15-natural"),
}
# Of the lines of METHODS: a colour, how many points right and up of its end the name is, a style.
LOOKS = {
    "AdamW + DDP": (COLOURS[6], (7, 0), "-"),
    "Dion": (COLOURS[2], (7, 0), "-"),
    "Muon +\nPowerSGD": (COLOURS[1], (7, 8), "-"),
    "Muon +\nGreedyLore": (COLOURS[0], (7, 18), ":"),
    UNCOMPRESSED: (COLOURS[4], (9, 9), "-"),
    "Muon + DDP": (COLOURS[5], (9, -10), "--"),
    "DeMo": (COLOURS[3], (7, 7), "-"),
    "DiLoCo": (COLOURS[1], (-24, 22), "--"),
    "MuLoCo": (COLOURS[2], (7, 0), "--"),
    "SparseLoCo": (COLOURS[3], (-10, -4), "--"),
    OURS: (COLOURS[0], (7, 0), "-"),
}
ROUNDS = {  # a message, and the settings that send it
    "signs of all entries": [f"local{every}-signs" for every in (1, 4, 10, 30, 60, 120)],
    "every entry in 2 bits": [f"local{every}" for every in (4, 10, 30, 60)],
    "MuLoCo, 2 bits": ["muloco-every10", "muloco"],
    "quantized rank 6 %, momentum at the server": ["served6"],
    "Muon, PowerSGD rank 16": ["powersgd16"],
    "everything": ["identity"],
}
POINTS_OF_SIZES = {
    "served6": "sync every step",
    "local4-signs": "signs, sync every 4 steps",
    "local30-signs": "signs, sync every 30",
    "local60-signs": "signs, sync every 60",
    "muloco": "MuLoCo, sync every 30",
}


FIGURES: dict[str, Callable[[Results, Path], None]] = {}  # what writes each into a folder


def figure(width: float, height: float, count: int = 1, **shared) -> Callable:
    """Registers X_figure, which draws into so many panels side by side, as the figure X."""

    def register(draw: Callable) -> Callable:
        name = draw.__name__.removesuffix("_figure")

        def write(results: Results, folder: Path) -> None:
            with picture.panels(folder / name, width, height, 1, count, **shared) as axes:
                draw(results, axes)

        FIGURES[name] = write
        return draw

    return register


def level(axes, value: float) -> None:
    """A thin line across."""
    axes.axhline(value, color="#888888", linewidth=0.8)


def line(axes, points: study.Line, index: int, label: str) -> None:
    axes.plot(*zip(*points, strict=True), label=label, **line_look(index))


def by_tokens_of_seeds(axes, one: Result, index: int) -> None:
    """A line for the mean loss over seeds, and a band from the least to the most."""
    tokens = [record["tokens"] for record in one.logs[0].evals]
    of_seeds = ([record["test_loss"] for record in log.evals] for log in one.logs)
    losses = list(zip(*of_seeds, strict=True))
    look = line_look(index)
    axes.plot(tokens, list(map(mean, losses)), markersize=3, label=one.label, **look)
    if len(one.logs) > 1:
        least, most = list(map(min, losses)), list(map(max, losses))
        axes.fill_between(tokens, least, most, color=look["color"], alpha=0.2, linewidth=0)


@figure(13, 3.8, 4)
def paper_figure(results: Results, axes) -> None:
    """The paper's four panels: loss against tokens, and bytes to the target, for two families."""
    target = results["identity"].target
    for (family, names), by_tokens, to_target in zip(
        PANELS.items(), axes[::2], axes[1::2], strict=True
    ):
        shown = [results[name] for name in names]
        for index, one in enumerate(shown):
            by_tokens_of_seeds(by_tokens, one, index)
        level(by_tokens, target)
        by_tokens.set(xlabel="training tokens", ylabel=LOSS, yscale="log")
        by_tokens.set_ylim(0.97 * min(min(one.ends) for one in shown), 2.2)
        by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
        picture.plain_losses(by_tokens)
        by_tokens.legend(loc="lower left", fontsize=6)
        reached = [(index, one) for index, one in enumerate(shown) if one.to_target(SENT)]
        for place, (index, one) in enumerate(reached):
            top = (place, one.sizes_to_target(SENT))
            times = f"{one.times_to_target(SENT):.1f}x"
            to_target.bar(*top, color=line_look(index)["color"])
            to_target.annotate(times, top, ha="center", va="bottom")
        labels = [one.label for _, one in reached]
        to_target.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
        to_target.set_axisbelow(True)
        to_target.set_ylabel(f"x model size (fp32) sent, to loss {target:.3f}")
        to_target.set_title(f"{family} family", fontsize=9)
        to_target.margins(y=0.1)


@figure(9, 4.8)
def envelopes_figure(results: Results, axes) -> None:
    """The envelope of every method; at the target, by how much ours sends and receives less."""
    target = results["identity"].target

    def write(text: str, point: tuple, offset: tuple[int, int], colour: str) -> None:
        side = "left" if offset[0] >= 0 else "right"
        how = {"color": colour, "ha": side, "va": "center", "linespacing": 1}
        axes.annotate(text, point, offset, textcoords="offset points", **how)

    for method, points in study.envelopes(results).items():
        colour, place, style = LOOKS[method]
        width = 3 if method == OURS else 1.8
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, linestyle=style)
        write(method, points[-1], place, colour)
    axes.axhline(target, color="#777777", linewidth=0.8, linestyle="--", zorder=0)
    write(f"target loss {target:.3f}", (0.011, target), (0, 6), "#777777")
    least, whole = (
        one.sizes_to_target(BOTH) for one in (study.fewest(results), results["identity"])
    )
    colour = LOOKS[OURS][0]
    arrow = {"arrowstyle": "<->", "color": colour}
    axes.annotate("", (least, target), (whole, target), arrowprops=arrow)
    between = least**0.7 * whole**0.3
    write(f"{whole / least:,.0f} times fewer bytes", (between, target), (0, 7), colour)
    axes.set(
        xlabel="x model size (fp32), that a worker sends and receives",
        ylabel="lowest test loss so far (nats per token)",
        xscale="log",
        yscale="log",
        xlim=(0.01, 2500),
        ylim=(1.28, 3.3),
    )
    picture.plain_sizes(axes)
    picture.plain_losses(axes)


@figure(10, 4, 2)
def rounds_figure(results: Results, pair) -> None:
    """By message and steps per round: bytes both ways to the target, and the loss gap."""
    to_target, at_the_end = pair
    ticks = set()
    for index, (message, names) in enumerate(ROUNDS.items()):
        shown = {
            one.run["config"]["optimizer"].get("sync_every", 1): one
            for one in map(results.get, names)
        }
        ticks |= shown.keys()
        reached = [(n, size) for n, one in shown.items() if (size := one.sizes_to_target(BOTH))]
        line(to_target, reached, index, message)
        line(at_the_end, [(n, one.gap) for n, one in shown.items()], index, message)
    target = results["identity"].target
    to_target.set(ylabel=f"x model size (fp32), both ways, to loss {target:.3f}", yscale="log")
    to_target.yaxis.set_major_formatter("{x:g}")
    at_the_end.set_ylabel(LOSS_GAP)
    for axes in (to_target, at_the_end):
        axes.set_xlabel("steps per round")
        picture.ticks_alone(axes, {steps: str(steps) for steps in sorted(ticks)})
    to_target.legend(fontsize=7)


@figure(10, 4)
def ends_figure(results: Results, axes) -> None:
    """Of every setting its loss gap, by how many times fewer bytes."""
    for method in study.METHODS:
        if method != UNCOMPRESSED and (members := study.of_method(results, method)):
            colour, _, style = LOOKS[method]
            axes.plot(
                [one.times_fewer for one in members],
                [one.gap for one in members],
                marker="o" if method == OURS else "s",
                linestyle="",
                color=colour,
                fillstyle="full" if style == "-" else "none",
                label=method.replace("\n", " "),
            )
    level(axes, 0)
    axes.set_xlabel("times fewer bytes that a worker sends and receives in the whole run")
    axes.set(ylabel=LOSS_GAP, xscale="log")
    picture.plain_gaps(axes)
    picture.plain_sizes(axes)
    axes.set_ylim(-1, 100)
    picture.legend_outside(axes, fontsize=7)


@figure(10, 3.8, 2, sharey=True)
def workers_figure(results: Results, pair) -> None:
    """The loss gap to as many workers uncompressed: by their number, by bytes."""
    by_number, by_bytes = pair
    found = study.by_workers(results)
    for index, name in enumerate(name for name in OF_WORKERS if name != "identity"):
        gaps = [(n, points[name].gap) for n, points in found.items()]
        line(by_number, gaps, index, results[name].short)
    for index, (n, points) in enumerate(found.items()):
        signs = (points[name] for name in OF_WORKERS if name.endswith("signs"))
        line(by_bytes, sorted((one.moved, one.gap) for one in signs), index, f"{n} workers")
    by_number.set_xlabel("workers")
    by_number.set_ylabel(LOSS_GAP)
    picture.ticks_alone(by_number, {n: str(n) for n in found})
    by_bytes.set(
        xlabel="x model size (fp32), sent and received, signs of all entries", xscale="log"
    )
    picture.plain_sizes(by_bytes)
    for axes in (by_number, by_bytes):
        level(axes, 0)
        axes.legend(fontsize=7)


@figure(10, 3.8, 2)
def sizes_figure(results: Results, pair) -> None:
    """By parameters: how many times fewer bytes to each size's target, and loss gap."""
    fewer, over = pair
    ticks = {}
    for index, (name, words) in enumerate(POINTS_OF_SIZES.items()):
        points = (study.of_condition(results, f"sizes/{size}-1").get(name) for size in SIZES)
        shown = {one.run["parameters"]: one for one in points if one}
        ticks |= {count: f"{count / 1e6:.1f} M" for count in shown}
        times = {count: one.times_to_target(BOTH) for count, one in shown.items()}
        line(fewer, [(count, value) for count, value in times.items() if value], index, words)
        line(over, [(count, one.gap) for count, one in shown.items()], index, words)
    fewer.set(ylabel="times fewer bytes to the size's own target", yscale="log")
    fewer.yaxis.set_major_formatter("{x:g}")
    over.set_ylabel(LOSS_GAP)
    level(over, 0)
    for axes in (fewer, over):
        axes.set_xlabel("parameters")
        picture.ticks_alone(axes, ticks)
    over.legend(fontsize=7)


def summary(results: Results) -> str:
    """The loss gap of every setting but those of grids, in percent, by name."""
    kept = {name: one for name, one in results.items() if one.setting.family != "grid"}
    gaps = {name: round(one.gap, 3) for name, one in kept.items()}
    return json.dumps({"loss_gap_percent": gaps}, indent=1) + "\n"


def main() -> int:
    try:
        results = study.read()
        (study.RESULTS.parent / "README.md").write_text(page(results))
        (study.RESULTS / "summary.json").write_text(summary(results))
        for write in FIGURES.values():
            write(results, study.RESULTS)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
