"""Draw the study of results/shakespeare from its logs: `python scripts/shakespeare/figures.py`.

Figures go to results/shakespeare, tables and what they show in words to results/README.md, and loss
gaps to results/shakespeare/summary.json, which `dry_run=true` reads. The same logs always give the
same files.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.shakespeare import results as study
from scripts.shakespeare.axes import (
    LOSS,
    LOSS_GAP,
    bars,
    by_family,
    gaps_upwards,
    legend_outside,
    level,
    line,
    panels,
    with_band,
)
from scripts.shakespeare.page import page
from scripts.shakespeare.results import (
    BACK,
    BOTH,
    METHODS,
    OURS,
    RESULTS,
    SENT,
    UNCOMPRESSED,
    Results,
)
from scripts.shakespeare.runs import OF_WORKERS, SIZES
from training import picture
from training.drawing import EngFormatter, Figure, matplotlib
from training.picture import COLOURS, plain_losses, plain_sizes, ticks_alone

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


def paper_figure(results: Results) -> Figure:
    """The paper's four panels: loss against tokens, and bytes to the target, for two families."""
    figure, axes = panels(13, 3.8, 4)
    target = results["identity"].target()
    for (family, names), by_tokens, to_target in zip(
        PANELS.items(), axes[::2], axes[1::2], strict=True
    ):
        shown = [results[name] for name in names]
        for index, one in enumerate(shown):
            with_band(by_tokens, one, index, "tokens", one.label)
        level(by_tokens, target)
        by_tokens.set(xlabel="training tokens", ylabel=LOSS, yscale="log")
        by_tokens.set_ylim(0.97 * min(min(one.ends) for one in shown), 2.2)
        by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
        plain_losses(by_tokens)
        by_tokens.legend(loc="lower left", fontsize=6)
        sent = [(one, one.sizes_to_target(SENT)) for one in shown]
        whole = sent[0][1]
        rows = [
            (one.label, size, f"{whole / size:.1f}x", COLOURS[index % len(COLOURS)])
            for index, (one, size) in enumerate(sent)
            if size
        ]
        bars(to_target, rows)
        to_target.set_ylabel(f"x model size (fp32) sent, to loss {target:.3f}")
        to_target.set_title(f"{family} family", fontsize=9)
        to_target.margins(y=0.1)
    return figure


def envelopes_figure(results: Results) -> Figure:
    """The envelope of every method; at the target, by how much ours sends and receives less."""
    figure, (axes,) = panels(9, 4.8)
    target = results["identity"].target()

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
    plain_sizes(axes)
    plain_losses(axes)
    return figure


def rounds_figure(results: Results) -> Figure:
    """By message and steps per round: bytes both ways to the target, and the loss gap."""
    figure, (to_target, at_the_end) = panels(10, 4, 2)
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
    target = results["identity"].target()
    to_target.set(ylabel=f"x model size (fp32), both ways, to loss {target:.3f}", yscale="log")
    to_target.yaxis.set_major_formatter("{x:g}")
    at_the_end.set_ylabel(LOSS_GAP)
    for axes in (to_target, at_the_end):
        axes.set_xlabel("steps per round")
        ticks_alone(axes, {steps: str(steps) for steps in sorted(ticks)})
    to_target.legend(fontsize=7)
    return figure


def ends_figure(results: Results) -> Figure:
    """Of every setting its loss gap, by how many times fewer bytes."""
    figure, (axes,) = panels(10, 4)
    for method in METHODS:
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
    gaps_upwards(axes)
    axes.set_ylim(-1, 100)
    legend_outside(figure, axes, fontsize=7)
    return figure


def bytes_figure(results: Results) -> Figure:
    """Test loss against bytes, every setting of the study, with seeds as bands."""
    figure, (axes,) = panels(12, 6)
    shown = by_family(results)
    for index, (family, members) in enumerate(shown.items()):
        for place, one in enumerate(members):
            with_band(axes, one, index, SENT, None if place else family)
            last = one.sizes(one.last[SENT])
            axes.annotate(f" {one.setting.level}", (last, one.loss), fontsize=6)
    level(axes, results["identity"].target())
    axes.set(
        xlabel="x model size (fp32), sent to the servers per worker",
        ylabel=LOSS,
        xscale="log",
        yscale="log",
    )
    axes.set_ylim(0.97 * min(min(one.ends) for ones in shown.values() for one in ones), 2.6)
    plain_sizes(axes)
    plain_losses(axes)
    legend_outside(figure, axes)
    return figure


def rate_figure(results: Results) -> Figure:
    """Bits per parameter and step against the loss gap."""
    figure, (axes,) = panels(10, 5.5)
    for index, (family, members) in enumerate(by_family(results).items()):
        points = sorted((one.bits, one.gap, one.setting.level) for one in members)
        line(axes, [point[:2] for point in points], index, family)
        for x, y, name in points:
            axes.annotate(f" {name}", (x, y), fontsize=6)
    level(axes, 0)
    axes.set_xlabel("bits sent to the servers per parameter and step")
    gaps_upwards(axes)
    legend_outside(figure, axes)
    return figure


def directions_figure(results: Results) -> Figure:
    """Bytes of both directions to the target, of settings with and without s2w compression."""
    shown = [
        one
        for name, one in results.items()
        if (name == "identity" or one.setting.family == "both ways" or f"{name}-both" in results)
        and one.to_target(BOTH)
    ]
    figure, (axes,) = panels(6, 4)
    for place, one in enumerate(shown):
        up, down = map(one.sizes_to_target, (SENT, BACK))
        labels = (None, None) if place else ("to the servers", "back to the workers")
        axes.bar(place, up, color=COLOURS[0], label=labels[0])
        axes.bar(place, down, bottom=up, color=COLOURS[5], label=labels[1])
        axes.annotate(f"{up + down:.0f}", (place, up + down), ha="center", va="bottom")
    axes.set_xticks(range(len(shown)), [one.short for one in shown], rotation=20, ha="right")
    axes.set_axisbelow(True)
    axes.margins(y=0.1)
    axes.set_ylabel(f"x model size (fp32), to loss {results['identity'].target():.3f}")
    axes.legend()
    return figure


def workers_figure(results: Results) -> Figure:
    """The loss gap to as many workers uncompressed: by their number, by bytes."""
    figure, (by_number, by_bytes) = panels(10, 3.8, 2, sharey=True)
    found = study.by_workers(results)
    for index, name in enumerate(name for name in OF_WORKERS if name != "identity"):
        gaps = [(n, points[name].gap) for n, points in found.items()]
        line(by_number, gaps, index, results[name].short)
    for index, (n, points) in enumerate(found.items()):
        signs = (points[name] for name in OF_WORKERS if name.endswith("signs"))
        line(by_bytes, sorted((one.moved, one.gap) for one in signs), index, f"{n} workers")
    by_number.set_xlabel("workers")
    by_number.set_ylabel(LOSS_GAP)
    ticks_alone(by_number, {n: str(n) for n in found})
    by_bytes.set(
        xlabel="x model size (fp32), sent and received, signs of all entries", xscale="log"
    )
    plain_sizes(by_bytes)
    for axes in (by_number, by_bytes):
        level(axes, 0)
        axes.legend(fontsize=7)
    return figure


def sizes_figure(results: Results) -> Figure:
    """By parameters: how many times fewer bytes to each size's target, and loss gap."""
    figure, (fewer, over) = panels(10, 3.8, 2)
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
        ticks_alone(axes, ticks)
    over.legend(fontsize=7)
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "paper": paper_figure,
    "envelopes": envelopes_figure,
    "rounds": rounds_figure,
    "ends": ends_figure,
    "bytes": bytes_figure,
    "rate": rate_figure,
    "directions": directions_figure,
    "workers": workers_figure,
    "sizes": sizes_figure,
}


def summary(results: Results) -> str:
    """The loss gap of every setting but those of grids, in percent, by name."""
    kept = {name: one for name, one in results.items() if one.setting.family != "grid"}
    gaps = {name: round(one.gap, 3) for name, one in kept.items()}
    return json.dumps({"loss_gap_percent": gaps}, indent=1) + "\n"


def draw(results: Results, output: Path) -> list[Path]:
    """Write all figures; returns the files."""
    with matplotlib.rc_context(picture.STYLE):
        return [
            path
            for name, build in FIGURES.items()
            for path in picture.save(build(results), output / name)
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args(arguments)
    try:
        results = study.read()
        for path in draw(results, RESULTS):
            print(path)
        (RESULTS.parent / "README.md").write_text(page(results))
        (RESULTS / "summary.json").write_text(summary(results))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
