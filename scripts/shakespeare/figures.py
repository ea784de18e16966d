"""Draw the study of results/shakespeare from its logs: `python scripts/shakespeare/figures.py`.

Figures go to results/shakespeare, what they show in words and tables to results/README.md.

Bytes are those that one worker sends to the servers, as multiples of the model's size in float32
(4 bytes per parameter). The target loss is fixed by a rule: the uncompressed run's test loss at
75 % of its tokens, mean of its seeds. Where a run reaches it is interpolated between evaluations.
The same logs always give the same files.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.shakespeare.conditions import SIZE_SETTINGS
from scripts.shakespeare.ends import ends_figure, over_sizes
from scripts.shakespeare.envelopes import envelopes_figure
from scripts.shakespeare.report import page
from scripts.shakespeare.results import (
    LOCAL,
    NETWORK_LOG,
    PEERS,
    RESULTS,
    TARGET_SHARE,
    Result,
    read,
    read_differences,
    read_replay,
    read_settings,
    read_workers,
    savings,
    target_loss,
    times,
)
from scripts.shakespeare.rounds import rounds_figure
from scripts.shakespeare.sizes import sizes_figure
from scripts.shakespeare.times import LINKS
from scripts.shakespeare.workers import workers_figure
from training.drawing import EngFormatter, Figure, NullLocator, matplotlib
from training.picture import (
    COLOURS,
    STYLE,
    line_look,
    plain_losses,
    plain_sizes,
    save,
    ticks_alone,
)

PANELS = {  # the paper's family in its first two panels, and in its last two
    "rank": ("identity", "natural", "rank20", "rank15", "rank10", "rank5", "rank15-natural"),
    "top": ("identity", "natural", "top20", "top15", "top10", "top5", "top15-natural"),
}

METHODS = {  # by family
    "identity": "EF21-Muon, uncompressed",
    "quantized rank": "EF21-Muon, quantized rank",
    "quantized rank, server momentum": "EF14, quantized rank, server momentum",
    **{
        name: name
        for name in ("Muon", "AdamW", "Muon + PowerSGD", "Muon + GreedyLore", "Dion", "DeMo")
    },
}
METHOD_SHARES = (0.5, TARGET_SHARE)  # of the uncompressed run's tokens


def paper_figure(results: dict[str, Result], target: float) -> Figure:
    """The paper's four panels: loss against tokens, and bytes to the target, for two families."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 4)
    saved = savings(results, target)
    for (family, names), by_tokens, bars in zip(PANELS.items(), axes[::2], axes[1::2], strict=True):
        shown = [results[name] for name in names if name in results]
        for index, result in enumerate(shown):
            plot(by_tokens, result, index, "tokens", label=result.label)
        by_tokens.axhline(target, color="#888888", linewidth=0.8)
        by_tokens.set(xlabel="training tokens", ylabel="test loss (nats per token)", yscale="log")
        by_tokens.set_ylim(0.97 * min(min(r.final) for r in shown), 2.2)
        by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
        plain_losses(by_tokens)
        by_tokens.legend(loc="lower left", fontsize=6)
        reached = [result for result in shown if result.setting.name in saved]
        for place, result in enumerate(reached):
            sent = result.sent(target)
            bars.bar(place, sent, color=COLOURS[shown.index(result) % len(COLOURS)])
            bars.annotate(
                f"{saved[result.setting.name]:.1f}x", (place, sent), ha="center", va="bottom"
            )
        bars.set_xticks(range(len(reached)), [r.label for r in reached], rotation=40, ha="right")
        bars.set_ylabel(f"x model size (fp32) sent, to loss {target:.3f}")
        bars.set_title(f"{family} family", fontsize=9)
        bars.set_axisbelow(True)
        bars.margins(y=0.1)
    return figure


def bytes_figure(results: dict[str, Result], target: float) -> Figure:
    """Test loss against bytes, every setting of the study, with seeds as bands."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots()
    shown = by_family(results)
    for index, (family, members) in enumerate(shown.items()):
        for place, result in enumerate(members):
            plot(axes, result, index, "w2s_bytes", label=None if place else family)
            last = result.sizes(result.logs[0].evals[-1]["w2s_bytes"])
            axes.annotate(f" {result.setting.level}", (last, mean(result.final)), fontsize=6)
    axes.axhline(target, color="#888888", linewidth=0.8)
    axes.set(
        xlabel="x model size (fp32), sent to the servers per worker",
        ylabel="test loss (nats per token)",
        xscale="log",
        yscale="log",
    )
    axes.set_ylim(0.97 * min(min(r.final) for rs in shown.values() for r in rs), 2.6)
    plain_sizes(axes)
    plain_losses(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def rate_figure(results: dict[str, Result]) -> Figure:
    """Bits per parameter and step against the loss gap."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, (family, members) in enumerate(by_family(results).items()):
        points = sorted(
            (result.bits, result.over(results["identity"]), result.setting.level)
            for result in members
        )
        bits, gaps, levels = zip(*points, strict=True)
        axes.plot(bits, gaps, label=family, **line_look(index))
        for x, y, level in zip(bits, gaps, levels, strict=True):
            axes.annotate(f" {level}", (x, y), fontsize=6)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xlabel("bits sent to the servers per parameter and step")
    over_sizes(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def by_family(results: dict[str, Result]) -> dict[str, list[Result]]:
    """The settings that figures of all of them show, in the study's order."""
    families: dict[str, list[Result]] = {}
    for result in results.values():
        if result.setting.family not in ("grid", "feedback", *LOCAL, *PEERS):
            families.setdefault(result.setting.family, []).append(result)
    return families


def methods_figure(results: dict[str, Result]) -> Figure:
    """Bytes to an early loss and to the target: of each method the level that takes the fewest."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    families = by_family(results)
    looks = {family: line_look(index) for index, family in enumerate(families)}
    shown = [family for family in METHODS if family in families]
    for share, axes in zip(METHOD_SHARES, figure.subplots(1, len(METHOD_SHARES)), strict=True):
        target = target_loss(results["identity"], share)
        for place, family in enumerate(shown):
            sent = [
                (size, result.setting.level)
                for result in families[family]
                if (size := result.sent(target))
            ]
            size, level = min(sent, default=(0, "not reached"))
            axes.barh(place, size, color=looks[family]["color"])
            text = f" {size:.3g}  {level}" if size else f" {level}"
            axes.annotate(text, (size or 1, place), va="center", fontsize=8)
        axes.set_yticks(range(len(shown)), [METHODS[family] for family in shown])
        axes.invert_yaxis()
        axes.set(xscale="log", xlim=(1, 1000), title=f"to loss {target:.3f}")
        axes.set_axisbelow(True)
        axes.set_xlabel("x model size (fp32), sent to the servers per worker")
        plain_sizes(axes)
    return figure


def why_figure(results: dict[str, Result], replayed: dict[str, dict]) -> Figure:
    """Final loss against what scripts/shakespeare/replay.py measured of the same compressors."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for index, (family, members) in enumerate(by_family(results).items()):
        shown = [result for result in members if result.setting.name in replayed]
        gaps = [result.over(results["identity"]) for result in shown]
        for panel, key in zip(axes, ("error", "alignment"), strict=True):
            values = [replayed[result.setting.name][key] for result in shown]
            look = line_look(index) | {"linestyle": "", "label": family if shown else None}
            panel.plot(values, gaps, **look)
    axes[0].set(xlabel="error of the estimator, ||G - M|| / ||M||", yscale="symlog")
    axes[0].set_ylabel("loss gap (%)")
    axes[1].set_xlabel("alignment of the LMO's step with the uncompressed one")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_locator(NullLocator())
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center")
    return figure


def differences_figure(measured: list[dict]) -> Figure:
    """What differences of local steps have in common, by the steps of a round and the layer."""
    kinds = {
        "cosine": "cosine of two workers' differences",
        "stable_rank": "stable rank / smaller side",
        "kept": "share of squares in a tenth of the rank",
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    steps = sorted({record["every"] for record in measured})
    for axes, (key, title) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        for index, role in enumerate(dict.fromkeys(map(role_of, measured))):
            values = [
                mean(r[key] for r in measured if r["every"] == every and role_of(r) == role)
                for every in steps
            ]
            axes.plot(steps, values, label=role, **line_look(index))
        axes.set(xlabel="steps per round", ylabel=title, ylim=(0, 1))
        ticks_alone(axes, {every: str(every) for every in steps})
    axes.legend(fontsize=7)
    return figure


def role_of(record: dict) -> str:
    """The kind of a record's layer."""
    return record["layer"].removesuffix(".weight").rpartition(".")[2]


def directions_figure(results: dict[str, Result], target: float) -> Figure:
    """Bytes of both directions to the target, of settings with and without s2w compression."""
    shown = [
        result
        for name, result in results.items()
        if (name == "identity" or result.setting.family == "both ways" or f"{name}-both" in results)
        and all(result.reach(target))
    ]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for place, result in enumerate(shown):
        points = result.reach(target)
        up = result.sizes(mean(point.w2s for point in points))
        down = result.sizes(mean(point.s2w for point in points))
        first = place == 0
        axes.bar(place, up, color=COLOURS[0], label="to the servers" if first else None)
        label = "back to the workers" if first else None
        axes.bar(place, down, bottom=up, color=COLOURS[5], label=label)
        axes.annotate(f"{up + down:.0f}", (place, up + down), ha="center", va="bottom")
    axes.set_xticks(range(len(shown)), [r.short for r in shown], rotation=20, ha="right")
    axes.set_axisbelow(True)
    axes.margins(y=0.1)
    axes.set_ylabel(f"x model size (fp32), to loss {target:.3f}")
    axes.legend()
    return figure


def time_figure(results: dict[str, Result], target: float, log: Path) -> Figure:
    """Time to the target over slow links, from measured times of a step."""
    by_rate = times(results, target, log)
    figure = Figure(figsize=(4.5 * len(by_rate), 4), layout="constrained")
    for axes, (rate, seconds) in zip(
        figure.subplots(1, len(by_rate)), by_rate.items(), strict=True
    ):
        for place, value in enumerate(seconds.values()):
            axes.bar(place, value, color=COLOURS[place % len(COLOURS)])
            axes.annotate(f"{value:.0f} s", (place, value), ha="center", va="bottom")
        labels = [results[name].short for name in seconds]
        axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
        axes.set_title(LINKS[rate], fontsize=9)
        axes.set_axisbelow(True)
        axes.set_ylabel(f"seconds to loss {target:.3f}")
    return figure


def plot(axes, result: Result, index: int, key: str, label: str | None) -> None:
    """A line for the mean over seeds, and a band from the least to the most."""
    rows = list(zip(*(log.evals for log in result.logs), strict=True))
    x = [row[0][key] for row in rows]
    x = [result.sizes(value) for value in x] if key != "tokens" else x
    losses = [[record["test_loss"] for record in row] for row in rows]
    look = line_look(index)
    axes.plot(x, [mean(values) for values in losses], markersize=3, label=label, **look)
    if len(result.logs) > 1:
        least, most = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between(x, least, most, color=look["color"], alpha=0.2, linewidth=0)


def draw(directory: Path, output: Path) -> list[Path]:
    """Write the figures of the logs in `directory` into `output`; returns the files."""
    results = read(directory)
    target = target_loss(results["identity"])
    output.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[], Figure]] = {
        "paper": lambda: paper_figure(results, target),
        "envelopes": lambda: envelopes_figure(results, target),
        "rounds": lambda: rounds_figure(results, target),
        "ends": lambda: ends_figure(results),
        "bytes": lambda: bytes_figure(results, target),
        "rate": lambda: rate_figure(results),
        "methods": lambda: methods_figure(results),
    }
    if any(result.setting.family == "both ways" for result in results.values()):
        figures["directions"] = lambda: directions_figure(results, target)
    if len(workers := read_workers(directory, results)) > 1:
        figures["workers"] = lambda: workers_figure(workers)
    if sizes := read_settings(directory, SIZE_SETTINGS):
        figures["sizes"] = lambda: sizes_figure(sizes)
    if replayed := read_replay(directory):
        figures["why"] = lambda: why_figure(results, replayed)
    if measured := read_differences(directory):
        figures["differences"] = lambda: differences_figure(measured)
    if (directory / NETWORK_LOG).exists():
        figures["time"] = lambda: time_figure(results, target, directory / NETWORK_LOG)
    with matplotlib.rc_context(STYLE):
        return [path for name, build in figures.items() for path in save(build(), output / name)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args(arguments)
    try:
        for path in draw(RESULTS, RESULTS):
            print(path)
        (RESULTS.parent / "README.md").write_text(page(RESULTS))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
