"""The page of the network benchmark from given records, and the committed one by other code."""

import json

from readme import README

from scripts.network.run import LOG, report
from scripts.studies import read_records

RECORDS = [
    {
        "rate": rate,
        "nodes": 2,
        "method": method,
        "seconds": compute + communication,
        "compute": compute,
        "communication": communication,
        "bytes": sent,
        "tokens": 512,
    }
    for rate, slowness in (("100mbit", 10), ("1gbit", 1))
    for method, compute, communication, sent in (
        ("DDP + Muon", 1.5, 0.3 * slowness, 39_000_000),
        ("rank, replicated", 2.0, 0.025 * slowness, 2_600_000),
    )
]


def test_the_tables_tell_rates_ratios_and_speeds():
    far = {"delay": "50ms", "waiting": [0.5, 0.2], "w2s_bytes": 1e6, "placement": "sharded"}
    far |= {"rate": "10mbit", "method": "every 30, delay 2", "parameters": 9_700_000}
    lines = report([*RECORDS, far | {"seconds": 2.0, "tokens": 512}]).splitlines()
    assert [line for line in lines if line.startswith("### ")] == [
        "### 100mbit, 2 nodes",
        "### 1gbit, 2 nodes",
    ]
    assert "| DDP + Muon | 39.00 | 4.50 | 3.000 | 1.0x | 114 |" in lines
    assert "| rank, replicated | 2.60 | 2.25 | 0.250 | 12.0x | 228 |" in lines
    far_line = "| 10mbit | sync every 30, sync delay 2 | 1.000 | 2.000 | 0.200 | 10.0% | 256 |"
    assert far_line in lines


def test_the_committed_page_is_drawn_from_the_log():
    assert LOG.with_name("README.md").read_text() == report(read_records(LOG))


def test_the_readme_tells_how_long_training_waits():
    shares = {}
    for record in map(json.loads, LOG.read_text().splitlines()):
        if "waiting" in record:
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
