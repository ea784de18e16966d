"""What README.md and results/local_steps say follows from the committed logs, by other code."""

import json

import pytest
from readme import README
from run import ROOT

from scripts.local_steps.run import RESULTS, RUNS, report

LOGS = {path.stem: path for path in RESULTS.glob("*.jsonl")}


def records(name):
    return [json.loads(line) for line in LOGS[name].read_text().splitlines()]


def test_the_table_is_drawn_from_the_logs():
    assert LOGS.keys() <= RUNS.keys() and len(LOGS) >= 2
    assert (RESULTS / "README.md").read_text() == report()


@pytest.mark.parametrize("name", LOGS)
def test_a_row_is_what_the_log_says(name):
    run, *_, end = records(name)
    size = 4 * run["parameters"]
    evals = [one for one in records(name) if one["record"] == "eval"]
    after = next(i for i, one in enumerate(evals) if one["test_loss"] <= 1.4596)
    before, at = evals[after - 1], evals[after]
    share = (before["test_loss"] - 1.4596) / (before["test_loss"] - at["test_loss"])
    sent = before["w2s_bytes"] + share * (at["w2s_bytes"] - before["w2s_bytes"])
    cells = [
        str(run["config"]["optimizer"]["every"]),
        f"{end['test_loss']:.4f}",
        f"{end['w2s_bytes'] / size:.3f}",
        f"{sent / size:.3f}",
    ]
    assert f"| {' | '.join(cells)} |" in (RESULTS / "README.md").read_text()
    assert run["config"]["steps"] == 600 and run["world_size"] == 2
    assert run["config"]["norm"]["hidden"]["radius"] == 2
    assert run["config"]["w2s"]["values"] == "normal2"


def test_the_readme_tells_the_two():
    told = " ".join(README.split())
    for every in (30, 10):
        run, *_, end = records(f"every{every}")
        sent = end["w2s_bytes"] / (4 * run["parameters"])
        ends = f"every {every} steps ends at"
        assert f"{ends} a test loss of {end['test_loss']:.3f}" in told or (
            f"{ends} {end['test_loss']:.3f} and sends {sent:.2f}" in told
        )
        assert f"{sent:.2f}" in told
    assert (ROOT / "results" / "local_steps" / "README.md").exists()
