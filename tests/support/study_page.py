"""The study by other code: its logs, the tables of results/README.md, what a run has moved."""

import json
from collections import defaultdict
from functools import cache
from statistics import mean

from run import ROOT

LOGS = ROOT / "results" / "shakespeare" / "logs"
PAGE = (ROOT / "results" / "README.md").read_text()


@cache
def logs():
    """By the name of a run: its run record and its evaluations, as they are in the files."""
    found = defaultdict(list)
    for path in sorted(LOGS.glob("*.jsonl")):
        for record in map(json.loads, path.open()):
            found[record["name"]].append(record)
    runs = {}
    for name, (run, *evals, end) in found.items():
        assert (run["record"], end["record"], end["status"]) == ("run", "end", "completed"), name
        assert evals and {record["record"] for record in evals} == {"eval"}, name
        runs[name] = run, evals
    return runs


def seeds_of(name):
    """The runs of a setting."""
    return [run for run in logs() if run.rpartition("-seed")[0] == name]


def last_of(name, seed=0):
    """The last evaluation, and the model's size in bytes."""
    run, evals = logs()[f"{name}-seed{seed}"]
    return evals[-1], 4 * run["parameters"]


def end(name):
    """The final test loss, mean over seeds."""
    return mean(logs()[run][1][-1]["test_loss"] for run in seeds_of(name))


def gap(name, plain="identity"):
    """The loss gap in percent."""
    return 100 * (end(name) / end(plain) - 1)


def moved(last, size):
    """Sizes sent and received at an evaluation."""
    return (last["w2s_bytes"] + last["received_bytes"]) / size


def section(heading, page=PAGE):
    """What stands below a heading of a page."""
    return page.split(f"## {heading}\n")[1].split("\n## ")[0]


def table_after(heading, page=PAGE):
    """The first table below a heading of a page."""
    return first_table(section(heading, page))


def first_table(text):
    """Its heading, and its rows, as lists of cells."""
    lines = text.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("| "))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[0], rows[2:]
