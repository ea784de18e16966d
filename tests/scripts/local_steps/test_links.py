"""What README.md and results/local_steps say follows from the committed logs, by other code."""

import json

import pytest
from readme import README

from scripts.local_steps.run import RESULTS, RUNS, report

LOGS = {path.stem: path for path in RESULTS.glob("every*.jsonl")}


def records(name):
    return [json.loads(line) for line in LOGS[name].read_text().splitlines()]


def test_the_table_is_drawn_from_the_logs():
    assert LOGS.keys() <= RUNS.keys() and len(LOGS) >= 2
    assert (RESULTS / "README.md").read_text() == report()


def to_the_target(name):
    """Model sizes sent when the test loss is 1.4596, linear between evaluations."""
    run, *_ = records(name)
    evals = [one for one in records(name) if one["record"] == "eval"]
    after = next(i for i, one in enumerate(evals) if one["test_loss"] <= 1.4596)
    before, at = evals[after - 1], evals[after]
    share = (before["test_loss"] - 1.4596) / (before["test_loss"] - at["test_loss"])
    sent = before["w2s_bytes"] + share * (at["w2s_bytes"] - before["w2s_bytes"])
    return sent / (4 * run["parameters"])


@pytest.mark.parametrize("name", LOGS)
def test_a_row_is_what_the_log_says(name):
    run, *_, end = records(name)
    cells = [
        str(run["config"]["optimizer"]["every"]),
        f"{end['test_loss']:.4f}",
        f"{end['w2s_bytes'] / (4 * run['parameters']):.3f}",
        f"{to_the_target(name):.3f}",
    ]
    assert f"| {' | '.join(cells)} |" in (RESULTS / "README.md").read_text()
    assert run["config"]["steps"] == 600 and run["world_size"] == 2
    assert run["config"]["norm"]["hidden"]["radius"] == 2
    assert run["config"]["w2s"]["values"] == "normal2"


def test_the_readme_tells_what_the_logs_say():
    told = " ".join(README.split())
    ends, sent = {}, {}
    for name in LOGS:
        run, *_, end = records(name)
        ends[name] = f"{end['test_loss']:.3f}"
        sent[name] = f"{end['w2s_bytes'] / (4 * run['parameters']):.2f}"
    a_round, ten = "a round every 30 steps ends at a test loss of", "one every 10 steps ends at"
    assert f"{a_round} {ends['every30']} and sends {sent['every30']} model sizes" in told
    assert f"{ten} {ends['every10']} and sends {sent['every10']}" in told
    reached = [f"{to_the_target(f'every{every}'):.2f}" for every in (30, 60)]
    assert "takes {} sizes, with a round every 60 steps {};".format(*reached) in told


def test_the_readme_tells_how_long_training_waits():
    lines = (RESULTS / "links.jsonl").read_text().splitlines()
    shares = {}
    for record in map(json.loads, lines):
        share = 100 * min(record["waiting"]) / record["seconds"]
        shares[record["rate"], record["method"]] = share
    told = " ".join(README.split())
    plain, delayed, both, each = (
        shares["10mbit", name]
        for name in (
            "every 30",
            "every 30, delay 2",
            "every 30, stagger, delay 2",
            "a message a step",
        )
    )
    assert (
        f"training waits for {plain:.1f} % of its time, with the delay for {delayed:.1f} %, with "
        f"both for {both:.1f} %; one message a step waits for {each:.1f} %."
    ) in told
    assert all(share < 2 for (_, method), share in shares.items() if "delay" in method)
    assert {rate for rate, _ in shares} == {"10mbit", "100mbit", "1gbit", "unlimited"}
