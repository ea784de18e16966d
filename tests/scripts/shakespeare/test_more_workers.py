"""The tables of more workers and of kinds of momentum, from the logs by other code."""

import json
import re
from statistics import mean

import pytest

from scripts.shakespeare import run as study
from scripts.shakespeare.results import read, read_workers
from scripts.shakespeare.workers import workers_table

PAGE = (study.RESULTS.parent / "README.md").read_text()


def ends(name):
    """The last evaluations of a setting's seeds, with the model's size in bytes."""
    found = []
    for path in sorted(study.RESULTS.glob(f"{name}-seed*.jsonl")):
        run, *records = map(json.loads, path.read_text().splitlines())
        last = [one for one in records if one["record"] == "eval"][-1]
        found.append((last, 4 * run["parameters"], run["world_size"], run["label"]))
    return found


def table_after(heading):
    """The first table below a heading of the page."""
    return first_table(PAGE.split(f"## {heading}\n")[1].split("\n## ")[0])


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


def test_nothing_is_said_of_more_workers_before_they_have_run():
    assert ("## More workers" in PAGE) == bool(list(study.RESULTS.glob("workers/*.jsonl")))


def test_losses_and_sizes_of_more_workers_are_those_of_the_logs():
    found = read_workers(study.RESULTS, read(study.RESULTS))
    heading, rows = first_table(workers_table(found))
    assert len(found) == 1 or workers_table(found) in PAGE
    counts = [int(cell.split()[0]) for cell in heading[1::2]]
    names = ("identity", "served6", "local4-top30", "local10-top30", "local30-top30")
    checked = 0
    for name, (_, *cells) in zip(names, rows, strict=True):
        for n, end, sizes in zip(counts, cells[::2], cells[1::2], strict=True):
            runs = ends(name if n == 2 else f"workers/{n}-{name}")
            plain = ends("identity" if n == 2 else f"workers/{n}-identity")
            if end == "not run":
                assert not (runs and plain)
                continue
            assert {world for *_, world, _ in runs} == {n}
            loss = mean(last["test_loss"] for last, *_ in runs)
            assert end.startswith(f"{loss:.4f}")
            if name != "identity":
                over = 100 * (loss / mean(last["test_loss"] for last, *_ in plain) - 1)
                assert float(end.split(", ")[1].rstrip(" %")) == pytest.approx(over, abs=0.051)
            last, size, *_ = runs[0]
            if "received_bytes" in last:
                moved = (last["w2s_bytes"] + last["received_bytes"]) / size
                assert float(sizes.replace(",", "")) == pytest.approx(moved, rel=0.006)
            checked += 1
    assert checked >= 5


def test_kinds_of_momentum_have_the_losses_of_their_logs():
    _, rows = table_after("Kinds of momentum")
    found = []
    for message, kind, steps, gradients, end in rows:
        name = "identity" if message == "identity" else "fitted9"
        short = kind.replace(", gamma ", "")
        runs = ends(name if steps == "600" else f"momentum/{short}-{name}")
        assert end == f"{mean(last['test_loss'] for last, *_ in runs):.4f}"
        assert {last["step"] for last, *_ in runs} == {int(steps)}
        assert int(gradients) == int(steps) * (1 if kind == "polyak" else 2)
        found.append(re.sub(r"\W", "", f"{name}{kind}{steps}"))
    assert len(set(found)) == len(found) >= 2
