"""results/probes/README.md and its figures: page.md with numbers from the records of probes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import correlation, mean

from scripts.probes.steps import steps
from scripts.probes.times import CLOSE, ENOUGH, LINKS, Times, times
from scripts.shakespeare.axes import LOSS_GAP, bars, by_family, legend_outside, panels
from scripts.shakespeare.results import Results, read
from scripts.shakespeare.tables import SETTING, of, table
from scripts.studies import fill, read_records
from training import picture
from training.drawing import Figure, NullLocator, matplotlib
from training.picture import COLOURS, line_look, ticks_alone

PROBES = Path(__file__).resolve().parents[2] / "results" / "probes"
TEXT = Path(__file__).with_name("page.md")
KINDS = {
    "cosine": "cosine of two workers' differences",
    "stable_rank": "stable rank / smaller side",
    "kept": "share of squares in a tenth of the rank",
}
Records = list[dict]
Replayed = dict[str, dict]  # by setting


def draw(directory: Path) -> list[Path]:
    """Write the page and the figures of a folder's records into it; returns the figures' files."""
    results = read()
    records = {path.stem: read_records(path) for path in directory.glob("*.jsonl")}
    replayed = {one["name"]: one for one in records["replay"] if one["name"] in results}
    found = times(results, records["network"])
    values = {
        **of_replay(results, replayed),
        **of_differences(records["differences"]),
        **of_changes(records["changes"]),
        **steps(results, {(one["rule"], one["beta"]): one for one in records["sign_replay"]}),
        "label": lambda name: results[name].label,
        **of_times(results, found),
    }
    (directory / "README.md").write_text(fill(TEXT.read_text(), values))
    with matplotlib.rc_context(picture.STYLE):
        figures = {
            "why": why_figure(results, replayed),
            "differences": differences_figure(records["differences"]),
            "time": time_figure(results, found),
        }
        return [
            path for name, one in figures.items() for path in picture.save(one, directory / name)
        ]


def of_replay(results: Results, replayed: Replayed) -> dict[str, str]:
    """Rank correlations of what was replayed with the final losses."""
    losses = places([results[name].loss for name in replayed])
    by = {key: places([one[key] for one in replayed.values()]) for key in ("error", "alignment")}
    return {
        "replayed": str(len(replayed)),
        "error_and_loss": f"{correlation(by['error'], losses):.2f}",
        "alignment_and_loss": f"{correlation(by['alignment'], losses):.2f}",
    }


def places(values: Sequence[float]) -> list[int]:
    """The place of each among all, by size."""
    order = sorted(values)
    return [order.index(value) for value in values]


def hidden(records: Records) -> Records:
    return [one for one in records if one["layer"].startswith("blocks")]


def of_differences(records: Records) -> dict[str, Callable[[str], str]]:
    """Means over hidden layers, by the steps of a round."""

    def at(key: str, every: str) -> float:
        return mean(one[key] for one in hidden(records) if one["every"] == int(every))

    return {
        "cosine_after": lambda every: f"{at('cosine', every):.2f}",
        "kept_after": lambda every: f"{at('kept', every):.0%}",
    }


def of_changes(records: Records) -> dict[str, str]:
    """Means over hidden layers and steps."""
    return {
        "change": f"{mean(one['size'] for one in hidden(records)):.1f}",
        "change_cosine": f"{mean(one['cosine'] for one in hidden(records)):.2f}",
    }


def of_times(results: Results, found: Times) -> dict[str, str]:
    """A table by setting and link, and where the slowest link costs little."""
    rows = [[results[name], *map(of_links.get, LINKS)] for name, of_links in found.items()]
    links = [
        of(place, (words, lambda time: time.text)) for place, words in enumerate(LINKS.values(), 1)
    ]
    slowest = next(iter(LINKS))
    close = [row[0].label for row in rows if row[1] and row[1].is_close]
    return {
        "times": table([of(0, SETTING), *links], rows),
        "close": str(CLOSE),
        "enough": str(ENOUGH),
        "slowest": LINKS[slowest],
        "in_time": "; ".join(close) or "none",
    }


def why_figure(results: Results, replayed: Replayed) -> Figure:
    """Final loss against what was replayed of the same compressors."""
    figure, axes = panels(11, 4.2, 2, sharey=True)
    for index, (family, members) in enumerate(by_family(results).items()):
        shown = [one for one in members if one.setting.name in replayed]
        gaps = [one.gap for one in shown]
        for panel, key in zip(axes, ("error", "alignment"), strict=True):
            values = [replayed[one.setting.name][key] for one in shown]
            look = line_look(index) | {"linestyle": "", "label": family if shown else None}
            panel.plot(values, gaps, **look)
    axes[0].set(xlabel="error of the estimator, ||G - M|| / ||M||", yscale="symlog")
    axes[0].set_ylabel(LOSS_GAP)
    axes[1].set_xlabel("alignment of the LMO's step with the uncompressed one")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_locator(NullLocator())
    legend_outside(figure, axes[1])
    return figure


def differences_figure(records: Records) -> Figure:
    """What differences of local steps have in common, by the steps of a round and the layer."""
    figure, of_kinds = panels(11, 3.6, len(KINDS))
    steps = sorted({record["every"] for record in records})
    for axes, (key, title) in zip(of_kinds, KINDS.items(), strict=True):
        for index, role in enumerate(dict.fromkeys(map(role_of, records))):
            values = [
                mean(r[key] for r in records if r["every"] == every and role_of(r) == role)
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


def time_figure(results: Results, found: Times) -> Figure:
    """Time to the target over slow links, from measured times of a step."""
    figure, of_links = panels(4.5 * len(LINKS), 4, len(LINKS))
    for (link, title), axes in zip(LINKS.items(), of_links, strict=True):
        seconds = {name: of[link].seconds for name, of in found.items() if link in of}
        rows = [
            (results[name].short, value, f"{value:.0f} s", COLOURS[place % len(COLOURS)])
            for place, (name, value) in enumerate(seconds.items())
        ]
        bars(axes, rows)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel(f"seconds to loss {results['identity'].target:.3f}")
    return figure
