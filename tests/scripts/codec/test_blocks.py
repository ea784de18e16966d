"""What blocks and a diagonal geometry save: the records, and their claims by other code."""

import pytest

from scripts.codec import run
from scripts.studies import read_records, select
from training.config import ROOT

FOLDER = ROOT / "results/codec"
RECORDS = read_records(FOLDER / "blocks.jsonl")
FORMATS = select(RECORDS, record="format")
SHAPES = {(256, 128): 1, (128, 128): 16, (512, 128): 4, (128, 512): 4}  # of the study's model
LOST = {(one["input"], one["format"]): 1 - one["alpha"] for one in FORMATS}


def page():
    return (FOLDER / "blocks.md").read_text()


def test_the_whole_model_was_measured():
    assert RECORDS[0]["parameters"] == sum(m * n * layers for (m, n), layers in SHAPES.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 16, 1024])
def test_of_one_large_number_blocks_lose_what_can_be_summed_by_hand(bits, count):
    """In its own block the others have one variance, and in other blocks they are the largest."""
    lost = total = 0.0
    for (m, n), layers in SHAPES.items():
        small, step = (m * n) ** -0.5, 1 / (2 ** (bits - 1) - 1)
        share = small / step % 1
        lost += layers * (m * n / count - 1) * share * (1 - share) * step**2
        total += layers * (1 + (m * n - 1) * small**2)
    found = LOST["spike", f"int{bits}@{count}blocks"]
    assert found == pytest.approx(lost / total, rel=0.15)


def test_what_was_measured_is_below_the_bound():
    assert len(FORMATS) == 3 * len(run.BITS) * len(run.WAYS)
    assert all(1 - one["alpha"] <= one["omega"] for one in FORMATS)


def test_the_headline_is_in_the_records():
    assert 900 < LOST["spike", "int4@1blocks"] / LOST["spike", "int4@1024blocks"] < 1400
    ratios = [
        LOST["noise", "int4@1blocks"] / LOST["noise", "int4@1024blocks"],
        LOST["momentum", "int4@1blocks"] / LOST["momentum", "int4@1024blocks"],
        LOST["momentum", "int4"] / LOST["momentum", "rowcol4"],
        LOST["momentum", "int4@112"] / LOST["momentum", "rowcol4"],
    ]
    words = " ".join(page().split())
    for ratio, after in zip(
        ratios, (" times less, since", " times less. A", *2 * [" times"]), strict=True
    ):
        assert f" {ratio:.1f}{after}" in words
    bits = {one["format"]: one["bits_per_parameter"] for one in FORMATS}
    assert abs(bits["rowcol4"] - bits["int4@112"]) < 0.01


def test_the_committed_page_is_that_of_its_records():
    assert run.blocks_report(RECORDS) == page()
