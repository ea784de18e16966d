"""Seconds to the target over slow and far links: a table of the page."""

from pathlib import Path

from scripts.measuring import markdown
from scripts.shakespeare.findings import filled
from scripts.shakespeare.results import NETWORK_LOG, UNLIMITED, Result, step_times, times

LINKS = {  # as the log has them, and in words
    "10mbit": "10 Mbit/s",
    "100mbit": "100 Mbit/s",
    "1gbit": "1 Gbit/s",
    UNLIMITED: UNLIMITED,
}


def time_to_target(results: dict[str, Result], target: float, directory: Path) -> str:
    """The page's section; nothing where scripts/shakespeare/network.py has not run."""
    log = directory / NETWORK_LOG
    found = times(results, target, log) if log.exists() else {}
    if UNLIMITED not in found:
        return ""
    setting = (
        "Two nodes of a worker each on one machine, 50 ms from one another, every way at the rate "
        "(`scripts/shakespeare/network.py`): the median of so many measured seconds of a step, "
        "over whole rounds, times the steps to the target. In brackets what they are over the same "
        "steps without a limit and a delay; those below 1 tell how noisy that is."
    )
    picture = "![Time over slow links](shakespeare/time.png)"
    parts = ("## Time to the target", picture, filled(setting), times_table(results, found, log))
    return "\n\n".join(parts) + "\n\n"


def times_table(results: dict[str, Result], found: dict[str, dict[str, float]], log: Path) -> str:
    """Seconds by setting and link, and over those of the same steps without a limit and a delay."""
    measured = step_times(log)
    rows = [["setting", *LINKS.values(), "measured"]]
    for name, free in found[UNLIMITED].items():
        cells = [
            f"{seconds:,.0f} ({seconds / free:.2f}x)" if (seconds := found[link].get(name)) else ""
            for link in LINKS
            if link != UNLIMITED
        ]
        times_measured = f"{len(measured[UNLIMITED, name])}"
        rows.append([results[name].label, *cells, f"{free:,.0f}", times_measured])
    return markdown(rows, text_columns=1)
