"""results/README.md: the study in words and tables, from its logs."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from scripts.shakespeare.conditions import GENRE_SETTINGS, GPU_SETTINGS, SIZE_SETTINGS
from scripts.shakespeare.ends import nothing_lost
from scripts.shakespeare.findings import PEERS_TEXT, ROUNDS_TEXT, filled, findings, paragraphs
from scripts.shakespeare.momenta import momenta_table, momenta_text
from scripts.shakespeare.muon_feedback import WITHOUT, muon_feedback
from scripts.shakespeare.results import (
    LOCAL,
    PEERS,
    TARGET_SHARE,
    Result,
    read,
    read_changes,
    read_differences,
    read_momentum,
    read_replay,
    read_settings,
    read_sign_replay,
    read_workers,
    savings,
    target_loss,
)
from scripts.shakespeare.rivals import MORE, peers_table, rivals_table
from scripts.shakespeare.rounds import (
    differences_text,
    headline,
    rounds_table,
    where_others_are_ahead,
)
from scripts.shakespeare.runs import ALL_SETTINGS
from scripts.shakespeare.settings import FEEDBACK_SETTINGS, SIGN_SETTINGS
from scripts.shakespeare.signs import signs_section
from scripts.shakespeare.sizes import larger_models
from scripts.shakespeare.times import time_to_target
from scripts.shakespeare.workers import more_workers, unlike_text

TEXT = Path(__file__).with_name("report.md")


def page(directory: Path) -> str:
    """report.md with numbers from the logs. Its words were written by looking at them."""
    results, replayed = read(directory), read_replay(directory)
    workers, momenta = read_workers(directory, results), read_momentum(directory)
    feedback, signs = (read_settings(directory, s) for s in (FEEDBACK_SETTINGS, SIGN_SETTINGS))
    sizes, genres, on_gpu = (
        read_settings(directory, s) for s in (SIZE_SETTINGS, GENRE_SETTINGS, GPU_SETTINGS)
    )
    identity = results["identity"]
    target = target_loss(identity)
    run, last = identity.logs[0].run, identity.logs[0].evals[-1]
    return TEXT.read_text().format(
        headline=textwrap.fill(headline(results, target), 100),
        ahead=textwrap.fill(where_others_are_ahead(results), 100),
        peers=peers_table(results),
        peers_findings=paragraphs(PEERS_TEXT, results, target),
        rounds=rounds_table(results, target),
        differences=differences_text(read_differences(directory)),
        rounds_findings=paragraphs(ROUNDS_TEXT, results, target),
        parameters=run["parameters"],
        steps=last["step"],
        tokens_a_step=last["tokens"] // last["step"],
        millions=last["tokens"] / 1e6,
        torch=run["versions"]["torch"],
        target_share=TARGET_SHARE,
        target=target,
        times=time_to_target(results, target, directory),
        nothing_lost=nothing_lost(results),
        findings=findings(results, target, replayed),
        more=MORE - 1,
        rivals=rivals_table(results),
        settings=table(results, target),
        more_workers=more_workers(workers, on_gpu),
        larger_models=larger_models(sizes, results),
        unlike_text=unlike_text(genres),
        momenta=momenta_table(momenta, results),
        momenta_findings=filled(momenta_text(momenta, results, read_changes(directory))),
        muon_feedback=muon_feedback(feedback),
        signs=signs_section(signs, feedback.get(WITHOUT), read_sign_replay(directory)),
        missing=missing(
            [results, momenta, feedback, signs, sizes, genres, on_gpu, *workers.values()]
        ),
        grids=grid_table(results),
    )


def missing(parts: Iterable[dict[str, Result]]) -> str:
    """What of the study has not been run."""
    runs = {one.setting.name: len(one.logs) for part in parts for one in part.values()}
    left = []
    for setting in ALL_SETTINGS:
        if (done := runs.get(setting.name, 0)) < len(setting.seeds):
            left.append(f"{setting.name} ({len(setting.seeds) - done})" if done else setting.name)
    return f"\nNot run yet (`make study` does): {', '.join(left)}.\n" if left else ""


def table(results: dict[str, Result], target: float) -> str:
    """Every setting: rate, final loss, and what it takes to the target."""
    saved = savings(results, target)
    lines = [
        "| setting | seeds | bits per parameter and step | final test loss | loss gap "
        "| tokens to target | x model size to target | fewer than uncompressed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        if result.setting.family in ("grid", *LOCAL, *PEERS):
            continue
        reached = ["not reached", "", ""]
        if name in saved:
            points = result.reach(target)
            reached = [
                f"{mean(point.tokens for point in points) / 1e6:.2f} M",
                f"{result.sent(target):.2f}",
                f"{saved[name]:.1f}x",
            ]
        over = f"{result.over(results['identity']):+.2f} %"
        cells = [result.label, str(len(result.logs)), f"{result.bits:.3g}"]
        cells += [result.final_text, over, *reached]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_table(results: dict[str, Result]) -> str:
    """The grids by which radii and learning rates were chosen."""
    rows = [
        f"| {name.removeprefix('grid/')} | {result.final[0]:.4f} |"
        for name, result in results.items()
        if result.setting.family == "grid"
    ]
    return "\n".join(["| grid point, half the steps | final test loss |", "| --- | ---: |", *rows])
