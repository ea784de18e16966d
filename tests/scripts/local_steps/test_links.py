"""What README.md and results/local_steps say of slow links follows from the log, by other code."""

import json

from readme import README

from scripts.local_steps.links import LOG, report
from scripts.studies import read_records


def test_the_table_is_drawn_from_the_log():
    assert LOG.with_name("README.md").read_text() == report(read_records(LOG))


def test_the_readme_tells_how_long_training_waits():
    lines = LOG.read_text().splitlines()
    shares = {}
    for record in map(json.loads, lines):
        share = 100 * min(record["waiting"]) / record["seconds"]
        shares[record["rate"], record["method"]] = share
    text = " ".join(README.split())
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
        f"both for {both:.1f} %; with a sync every step it waits for {each:.1f} %."
    ) in text
    assert all(share < 2 for (_, method), share in shares.items() if "delay" in method)
    assert {rate for rate, _ in shares} == {"10mbit", "100mbit", "1gbit", "unlimited"}
