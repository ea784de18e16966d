"""Measure what explains the study: `python scripts/probes/run.py [--redraw]`, some minutes.

Records go to results/probes/probes.jsonl; README.md and figures beside it are drawn from them and
from the logs of the study: page.md with their numbers.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import correlation, mean

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scripts.probes import differences, replay
from scripts.shakespeare.page import words
from scripts.shakespeare.results import Results, by_family, read
from scripts.studies import command, fill, select
from training.config import ROOT
from training.picture import legend_outside, line_look, panels, plain_gaps, ticks_alone

PROBES = {"differences": differences.records, "replay": replay.records}
TEXT = Path(__file__).with_name("page.md")
KINDS = {
    "cosine": "cosine of two workers' differences",
    "stable_rank": "stable rank / smaller side",
    "kept": "share of squares in a tenth of the rank",
}
Records = list[dict]
Replayed = dict[str, dict]  # by setting


def measure(options: argparse.Namespace) -> Iterator[dict]:
    torch.set_num_threads(1)
    for probe, records in PROBES.items():
        for record in records():
            yield {"probe": probe} | record


def draw(records: Records, directory: Path) -> str:
    """Write the page and the figures into a folder; returns the page."""
    results = read()
    of_layers, of_settings = (select(records, probe=probe) for probe in PROBES)
    replayed = {one["name"]: one for one in of_settings if one["name"] in results}
    values = words(results) | of_replay(results, replayed) | of_differences(of_layers)
    text = fill(TEXT.read_text(), values)
    (directory / "README.md").write_text(text)
    draw_why(results, replayed, directory / "why")
    draw_differences(of_layers, directory / "differences")
    return text


def of_replay(results: Results, replayed: Replayed) -> dict[str, str]:
    """Rank correlations of what was replayed with the final losses."""
    losses = places([results[name].loss for name in replayed])

    def with_loss(key: str) -> str:
        return f"{correlation(places([one[key] for one in replayed.values()]), losses):.2f}"

    words = {f"{key}_and_loss": with_loss(key) for key in ("error", "alignment")}
    return words | {"replayed": str(len(replayed))}


def places(values: Sequence[float]) -> list[int]:
    """The place of each among all, by size."""
    order = sorted(values)
    return [order.index(value) for value in values]


def of_differences(records: Records) -> dict[str, Callable[[str], str]]:
    """Means over hidden layers, by the steps of a round."""
    hidden = [one for one in records if one["layer"].startswith("blocks")]

    def at(key: str, every: str) -> float:
        return mean(one[key] for one in select(hidden, every=int(every)))

    return {
        "cosine_after": lambda every: f"{at('cosine', every):.2f}",
        "kept_after": lambda every: f"{at('kept', every):.0%}",
    }


def draw_why(results: Results, replayed: Replayed, stem: Path) -> None:
    """Final loss against what was replayed of the same compressors."""
    with panels(stem, 11, 4.2, 1, 2, sharey=True) as (by_error, by_alignment):
        for index, (family, members) in enumerate(by_family(results).items()):
            shown = [one for one in members if one.setting.name in replayed]
            gaps = [one.gap for one in shown]
            look = line_look(index) | {"linestyle": "", "label": family if shown else None}
            for axes, key in ((by_error, "error"), (by_alignment, "alignment")):
                axes.plot([replayed[one.setting.name][key] for one in shown], gaps, **look)
        by_error.set(xlabel="error of the estimator, ||G - M|| / ||M||", ylabel="loss gap (%)")
        plain_gaps(by_error, linear=2)
        by_alignment.set_xlabel("alignment of the LMO's step with the uncompressed one")
        legend_outside(by_alignment)


def draw_differences(records: Records, stem: Path) -> None:
    """What differences of local steps have in common, by the steps of a round and the layer."""
    roles: dict[str, Records] = {}
    for one in records:
        roles.setdefault(role_of(one), []).append(one)
    steps = sorted({one["every"] for one in records})
    with panels(stem, 11, 3.6, 1, len(KINDS)) as of_kinds:
        for axes, (key, title) in zip(of_kinds, KINDS.items(), strict=True):
            for index, (role, members) in enumerate(roles.items()):
                values = [mean(one[key] for one in select(members, every=n)) for n in steps]
                axes.plot(steps, values, label=role, **line_look(index))
            axes.set(xlabel="steps per round", ylabel=title, ylim=(0, 1))
            ticks_alone(axes, {n: str(n) for n in steps})
        axes.legend(fontsize=7)


def role_of(record: dict) -> str:
    """The kind of a record's layer."""
    return record["layer"].removesuffix(".weight").rpartition(".")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    log = ROOT / "results" / "probes" / "probes.jsonl"
    return command(__doc__, log, measure, draw, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
