"""The LMO benchmark in as little time as it can."""

from scripts.lmo import run as bench_lmo


def test_the_report_has_every_norm(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_lmo, "SHAPES", ((16, 64), (32, 32)))
    bench_lmo.main(["--seconds", "0.1", "--out", str(tmp_path)])
    lines = (tmp_path / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    cells = {row[0]: row[1:] for row in rows}
    for norm in bench_lmo.NORMS:
        milliseconds, ratio = cells[f"`{norm!r}`"][0].replace(" ms", "").split(", ")
        assert float(milliseconds) > 0
        assert float(ratio) >= 0
    assert cells["`Spectral()`"][0].endswith(", 1.00")
