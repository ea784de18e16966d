"""The LMO benchmark on its smallest matrices."""

from scripts.lmo import run as bench_lmo


def test_the_report_has_every_norm_and_form(tmp_path):
    bench_lmo.main(["--quick", "--out", str(tmp_path)])
    lines = (tmp_path / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    cells = {row[0]: row[1:] for row in rows}
    for norm in bench_lmo.NORMS:
        milliseconds, ratio = cells[f"`{norm!r}`"][0].replace(" ms", "").split(", ")
        assert float(milliseconds) > 0
        assert float(ratio) >= 0
    assert cells["`Spectral()`"][0].endswith(", 1.00")
    step_by_step, *_, all_at_once = map(float, cells["jordan, to 1e-5"])
    assert step_by_step < 3e-5 < all_at_once < 1e-2
    assert len(cells["1 x 128 x 512"]) == len(bench_lmo.FORMS)
