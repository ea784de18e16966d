"""The tables of more workers and of kinds of momentum, from the logs by other code."""

import json
import re
from dataclasses import replace
from statistics import mean

import pytest
from logs import write_study_log
from study_page import PAGE, first_table, moved, table_after

from scripts.shakespeare import run as study
from scripts.shakespeare.results import read, read_settings, read_workers
from scripts.shakespeare.settings import Setting
from scripts.shakespeare.sizes import longer
from scripts.shakespeare.workers import workers_table
from training.renamed import modern_label


def ends(name):
    """The last evaluations of a setting's seeds, with the model's size in bytes."""
    found = []
    for path in sorted(study.RESULTS.glob(f"{name}-seed*.jsonl")):
        run, *records = map(json.loads, path.read_text().splitlines())
        last = [one for one in records if one["record"] == "eval"][-1]
        found.append((last, 4 * run["parameters"], run["world_size"], run["label"]))
    return found


def test_nothing_is_said_of_more_workers_before_they_have_run():
    assert ("## With more workers?" in PAGE) == bool(list(study.RESULTS.glob("workers/*.jsonl")))


def test_losses_and_sizes_of_more_workers_are_those_of_the_logs():
    found = read_workers(study.RESULTS, read(study.RESULTS))
    heading, rows = first_table(workers_table(found))
    assert len(found) == 1 or workers_table(found) in PAGE
    counts = [int(cell.split()[0]) for cell in heading[1::2]]
    names = ("identity", "served6", "local4-signs", "local10-signs", "local30-signs")
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


def test_losses_and_bytes_of_larger_models_are_those_of_the_logs():
    section = PAGE.split("## Does it hold as the model grows?\n")[1].split("\n## ")[0]
    _, rows = first_table(section)
    plain = {}
    for path in study.RESULTS.glob("sizes/*-1-identity-seed0.jsonl"):
        run, *records = map(json.loads, path.read_text().splitlines())
        plain[run["parameters"]] = [one for one in records if one["record"] == "eval"]
    logs = [path for path in study.RESULTS.glob("sizes/*.jsonl") if "-1-" in path.name]
    logs = [path for path in logs if not re.search("-radius|-cpu-", path.name)]
    assert len(rows) == len(logs) >= 10
    for path in logs:
        run, *records = map(json.loads, path.read_text().splitlines())
        assert run["world_size"] == 2
        evals = [one for one in records if one["record"] == "eval"]
        last, size = evals[-1], 4 * run["parameters"]
        sent = modern_label(run["label"]).replace("top 30% sign", "sign")  # which it was
        machine = {"cuda": "GPU", "cpu": "CPU"}[run["device"]]
        begins = [f"{run['parameters']:,}", sent, machine, f"{last['test_loss']:.4f}"]
        (cells,) = (row[4:] for row in rows if row[:4] == begins)
        assert float(cells[1].replace(",", "")) == pytest.approx(moved(last, size), rel=0.006)
        assert last["tokens"] == pytest.approx(run["parameters"], rel=0.03)
        if run["parameters"] not in plain:
            assert cells[0] == "not run" and cells[2:] == ["", ""]
            continue
        of_plain = plain[run["parameters"]]
        over = 100 * (last["test_loss"] / of_plain[-1]["test_loss"] - 1)
        assert float(cells[0].rstrip(" %")) == pytest.approx(over, abs=0.006)
        target = of_plain[8]["test_loss"]  # of twelve
        sizes = [moved(one, size) for one in evals]
        losses = [one["test_loss"] for one in evals]
        if min(losses) > target:
            assert cells[2:] == ["never", ""]
            continue
        first = next(place for place, loss in enumerate(losses) if loss <= target)
        share = (losses[first - 1] - target) / (losses[first - 1] - losses[first])
        reached = sizes[first - 1] + share * (sizes[first] - sizes[first - 1])
        assert float(cells[2].replace(",", "")) == pytest.approx(reached, rel=0.006)
        times = moved(of_plain[8], size) / reached
        assert float(cells[3].rstrip("x").replace(",", "")) == pytest.approx(times, rel=0.006)


def test_more_tokens_a_parameter_stand_beside_the_runs_of_the_study(tmp_path):
    settings = [Setting("identity", "identity", ()), Setting("local4-signs", "local steps", ())]
    settings += [replace(one, name=f"sizes/3M-3-{one.name}") for one in settings]
    losses = {"identity": 2.0, "local4-signs": 2.2}
    losses |= {"sizes/3M-3-identity": 1.0, "sizes/3M-3-local4-signs": 1.05}
    for one in settings:
        write_study_log(
            tmp_path / f"{one.name}-seed0.jsonl",
            [9.0, 5.0, 3.0, losses[one.name]],
            parameters=300 if one.name.startswith("sizes/") else 100,
            device="cpu",
        )
    results = read_settings(tmp_path, settings)
    of_sizes = {name: one for name, one in results.items() if name.startswith("sizes/")}
    _, rows = first_table("\n".join(longer(of_sizes, results)))
    ends = [(row[0], row[3], row[4]) for row in rows]
    assert ends == [
        ("100", "2.0000", "+0.00 %"),
        ("100", "2.2000", "+10.00 %"),
        ("300", "1.0000", "+0.00 %"),
        ("300", "1.0500", "+5.00 %"),
    ]
    del of_sizes["sizes/3M-3-identity"]
    assert longer(of_sizes, results) == []


def test_what_may_help_eight_workers_and_a_gpu_is_as_in_the_logs():
    workers = " ".join(PAGE.split("## With more workers?\n")[1].split("\n## ")[0].split())
    for name in ("identity", "local4-signs", "local30-signs"):
        (end,) = (last["test_loss"] for last, *_ in ends(f"workers/8-{name}-gpu"))
        if ends(f"workers/8-{name}"):
            assert f"{end:.4f} (" in workers
    plain = ends("workers/8-identity")
    names = ("dense2", "beta1", "beta4", "outer6", "outer8", "radius1", "back", "back6")
    tried = [f"workers/8-local{every}-{name}" for every in (2, 4, 10, 30) for name in names]
    tried = list(filter(None, map(ends, tried)))
    assert bool(tried) == ("What was tried for 8 workers" in workers) and len(plain) == 1
    for (last, size, *_), *_ in tried:
        over = 100 * (last["test_loss"] / plain[0][0]["test_loss"] - 1)
        cells = f"| {last['test_loss']:.4f} | {over:+.1f} % | {moved(last, size):.3g} |"
        assert cells in workers


def test_unlike_text_is_as_in_the_logs():
    for order in ("apart", "mixed"):
        plain = ends(f"genres/{order}-identity")
        assert len(plain) == len(ends(f"genres/{order}-local30-signs")) == 1
        for name in ("local4-signs", "local30-signs"):
            for last, *_ in ends(f"genres/{order}-{name}"):
                over = 100 * (last["test_loss"] / plain[0][0]["test_loss"] - 1)
                assert f"| {last['test_loss']:.4f} | {over:+.2f} % |" in PAGE
