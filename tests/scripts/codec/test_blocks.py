"""What blocks and a diagonal geometry save: the records, and their claims by other code."""

import numpy as np
import pytest
import torch

from scripts.codec import blocks
from scripts.studies import read_records, select
from training.config import ROOT

FOLDER = ROOT / "results/codec"
RECORDS = read_records(FOLDER / "blocks.jsonl")
FORMATS = select(RECORDS, record="format")
SHAPES = {(256, 128): 1, (128, 128): 16, (512, 128): 4, (128, 512): 4}  # of the study's model
LOST = {(one["input"], one["format"]): one["measured"] for one in FORMATS}


def page():
    return (FOLDER / "blocks.md").read_text()


def test_the_whole_model_was_measured():
    assert RECORDS[0]["parameters"] == sum(m * n * layers for (m, n), layers in SHAPES.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 4, 16, 64, 256, 1024])
def test_of_one_large_number_blocks_lose_what_can_be_summed_by_hand(bits, count):
    """In its own block the others have one variance, and in other blocks they are the largest."""
    lost = total = 0.0
    for (m, n), layers in SHAPES.items():
        small, step = (m * n) ** -0.5, 1 / (2 ** (bits - 1) - 1)
        share = small / step % 1
        lost += layers * (m * n / count - 1) * share * (1 - share) * step**2
        total += layers * (1 + (m * n - 1) * small**2)
    (record,) = select(FORMATS, format=f"int{bits}@{count}blocks", input="spike")
    assert record["predicted"] == pytest.approx(lost / total, rel=1e-3)


def test_what_was_measured_is_what_was_predicted_and_below_the_bound():
    for one in FORMATS:
        assert one["measured"] <= one["omega"]
        if one["predicted"] is not None:
            slack = 0.15 if one["input"] == "spike" else 0.02  # few numbers are drawn there
            assert one["measured"] == pytest.approx(one["predicted"], rel=slack), one


def test_the_headline_is_in_the_records():
    assert 1000 < LOST["spike", "int4@1blocks"] / LOST["spike", "int4@1024blocks"] < 1400
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
    bits = {one["format"]: one["bits_a_value"] for one in FORMATS}
    assert abs(bits["rowcol4"] - bits["int4@112"]) < 0.01


def test_the_formula_is_the_sum_over_neighbours():
    """Of every value both neighbours, by their probabilities."""
    x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0)).double()
    for bits, count, power in ((2, 3, 0.0), (4, 6, 0.5), (3, 1, 1.0)):
        expected = 0.0
        for matrix in x.numpy():
            root = np.abs(matrix).max(0) ** power
            for block, roots in zip(
                np.split((matrix / root).ravel(), count),
                np.split(np.tile(root, 6), count),
                strict=True,
            ):
                levels = np.abs(block).max() * np.linspace(-1, 1, 2**bits - 1)
                for value, of_value in zip(block, roots, strict=True):
                    above = min(max(np.searchsorted(levels, value), 1), len(levels) - 1)
                    low, high = levels[above - 1], levels[above]
                    expected += of_value**2 * (value - low) * (high - value)
        assert blocks.variance(x, bits, count, power) == pytest.approx(expected)


def test_a_format_is_measured_as_predicted():
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    found = blocks.measured([x], "int4@4blocks")
    predicted = blocks.variance(x, 4, 4, 0.0) / float(x.double().square().sum())
    assert found["measured"] == pytest.approx(predicted, rel=0.05)
    assert found["bits_a_value"] == 4 + 4 * 32 / x.numel()


def test_redrawing_changes_nothing(tmp_path, drawn):
    (tmp_path / "blocks.jsonl").write_bytes((FOLDER / "blocks.jsonl").read_bytes())
    assert blocks.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "blocks.md").read_text() == page()
    assert [len(axes.lines) for axes in drawn["blocks"].axes] == [10, 4]
