"""What the study found: the paragraphs of findings.md, with numbers from its logs."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import correlation, mean

from scripts.shakespeare.results import Result, savings

TEXT = Path(__file__).with_name("findings.md")
ROUNDS_TEXT = Path(__file__).with_name("rounds.md")
PEERS_TEXT = Path(__file__).with_name("peers.md")
PLACE = re.compile(r"\{(\w+)\s([^}]+)\}")


def findings(results: dict[str, Result], target: float, replayed: dict[str, dict]) -> str:
    """What the runs that sync every step show, and why."""
    written = [paragraphs(TEXT, results, target), *map(filled, why(results, replayed))]
    return "\n\n".join(written)


def paragraphs(text: Path, results: dict[str, Result], target: float) -> str:
    """The paragraphs whose runs are all done.

    {gap NAMES} stands for loss gaps, {bits NAMES} for bits per parameter and step, {fewer NAMES}
    for how many times fewer bytes the runs take to the target, {sizes NAMES} for all bytes that a
    worker sends and receives, as multiples of the model's size in float32.
    """
    saved = savings(results, target)
    numbers = {
        "gap": lambda name: f"{round(results[name].over(results['identity']), 1) + 0.0:+.1f} %",
        "bits": lambda name: f"{results[name].bits:.2g} bits",
        "fewer": lambda name: f"{saved[name]:.1f}x" if name in saved else "(never)",
        "sizes": lambda name: f"{results[name].by_both[-1][0]:.3g}",
    }
    done = []
    for paragraph in text.read_text().strip().split("\n\n"):
        names = {name for _, several in PLACE.findall(paragraph) for name in several.split()}
        if names <= results.keys():
            done.append(
                PLACE.sub(lambda place: listed(map(numbers[place[1]], place[2].split())), paragraph)
            )
    return "\n\n".join(map(filled, done))


def filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 100, break_on_hyphens=False)


def why(results: dict[str, Result], replayed: dict[str, dict]) -> list[str]:
    """What the replay explains, where it has enough settings to say so."""
    shown = sorted(replayed.keys() & results.keys())
    if len(shown) < 10:
        return []
    losses = places([mean(results[name].final) for name in shown])
    by_error, by_alignment = (
        correlation(places([replayed[name][key] for name in shown]), losses)
        for key in ("error", "alignment")
    )
    return [
        "**Why**: of one worker's gradients in the uncompressed run, sent by"
        f" {len(shown)} compressors of the study (`scripts/shakespeare/replay.py`), the error of G"
        f" has a rank correlation of {by_error:.2f} with the final loss, and the alignment"
        f" of the LMO's step of G with that of M one of {by_alignment:.2f}. An LMO gives small"
        " directions the length of large ones, so it helps to send many of them, if roughly:"
        " hence few bits for the long factor, and no gain from exact singular vectors."
    ]


def places(values: Sequence[float]) -> list[int]:
    """The place of each among all, by size."""
    order = sorted(values)
    return [order.index(value) for value in values]


def listed(parts: Iterable[str]) -> str:
    """Parts as a sentence has them: a, b and c."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
