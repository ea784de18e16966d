"""The table of the network benchmark, from given records."""

from scripts.network.run import report

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


def test_the_table_tells_rates_ratios_and_speeds():
    lines = report(RECORDS).splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        "## 100mbit, 2 nodes",
        "## 1gbit, 2 nodes",
    ]
    assert "| DDP + Muon | 39.00 | 4.50 | 3.000 | 1.0x | 114 |" in lines
    assert "| rank, replicated | 2.60 | 2.25 | 0.250 | 12.0x | 228 |" in lines
