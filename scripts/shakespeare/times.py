"""Seconds to the target over slow and far links: a table of the page."""

from pathlib import Path
from statistics import median

from scripts.measuring import markdown
from scripts.shakespeare.findings import filled
from scripts.shakespeare.results import NETWORK_LOG, UNLIMITED, Result, slowdowns, times

LINKS = {  # as the log has them, and in words
    "10mbit": "10 Mbit/s",
    "100mbit": "100 Mbit/s",
    "1gbit": "1 Gbit/s",
    UNLIMITED: UNLIMITED,
}
CLOSE = 1.05  # times the steps without a network, what was aimed at over the slowest link
ENOUGH = 3  # repeats that this takes of a setting


def time_to_target(results: dict[str, Result], target: float, directory: Path) -> str:
    """The page's section; nothing where scripts/shakespeare/network.py has not run."""
    log = directory / NETWORK_LOG
    found = times(results, target, log) if log.exists() else {}
    if UNLIMITED not in found:
        return ""
    slowest = next(iter(LINKS))
    over = slowdowns(log)
    close = [
        results[name].label
        for name in found[UNLIMITED]
        if len(repeats := over.get((slowest, name), [])) >= ENOUGH and median(repeats) <= CLOSE
    ]
    setting = (
        "Two nodes of a worker each on one machine, 50 ms from one another, both ways at the rate "
        "(`scripts/shakespeare/network.py`): the median of the seconds of a step, measured over "
        "whole rounds, times the steps to the target. In brackets the median of so many repeats of "
        "what such a step takes over one without a limit and a delay of the same repeat, as the "
        "machine's pace differs between repeats; those below 1 show how noisy that is. "
        f"Within {CLOSE} at {LINKS[slowest]}, of {ENOUGH} repeats or more: "
        f"{'; '.join(close) or 'none'}."
    )
    picture = "![Time over slow links](shakespeare/time.png)"
    parts = ("## Time to the target", picture, filled(setting), times_table(results, found, over))
    return "\n\n".join(parts) + "\n\n"


def times_table(
    results: dict[str, Result],
    found: dict[str, dict[str, float]],
    over: dict[tuple[str, str], list[float]],
) -> str:
    """Seconds by setting and link, and over those of the same steps without a limit and a delay."""
    rows = [["setting", *LINKS.values()]]
    for name, free in found[UNLIMITED].items():
        cells = []
        for link in (one for one in LINKS if one != UNLIMITED):
            repeats = over.get((link, name), [])
            ratio = f" ({median(repeats):.2f}x of {len(repeats)})" if repeats else ""
            cells.append(f"{found[link][name]:,.0f}{ratio}" if name in found.get(link, {}) else "")
        rows.append([results[name].label, *cells, f"{free:,.0f}"])
    return markdown(rows, text_columns=1)
