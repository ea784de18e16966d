"""The codec benchmark on a model of 20,480 parameters: its records, and drawing from them."""

import json

import numpy as np
import pytest

from scripts.codec import run as bench_codec
from training.config import ROOT


@pytest.fixture(scope="module")
def directory(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("codec")
    overrides = [*small, "model=tiny", "steps=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_codec, "REPEATS", 1)
        assert bench_codec.main(["--out", str(directory), *overrides]) == 0
    return directory


def test_records_follow_from_payloads(directory):
    run, *records = (json.loads(line) for line in (directory / "codec.jsonl").open())
    assert run["parameters"] == 256 * 32 + 12 * 32 * 32
    assert len(records) == 2 * len(bench_codec.COMPRESSORS)
    for record in records:
        assert record["bits_per_parameter"] == 8 * record["payload_bytes"] / run["parameters"]
        assert record["alpha"] <= 1
        if record["input"] == "noise":
            bound = 1 - 2 ** (-2 * record["bits_per_parameter"])
            assert bench_codec.shannon_alpha(record["bits_per_parameter"]) == bound
            assert record["alpha"] <= bound + 0.02  # 20,480 values are a sample
    natural = next(r for r in records if (r["compressor"], r["input"]) == ("natural", "noise"))
    assert natural["bits_per_parameter"] == 9
    assert natural["alpha"] == pytest.approx(expected_natural_alpha(), abs=0.005)


def expected_natural_alpha() -> float:
    """1 - E (|v| - 2^e) (2^(e+1) - |v|) of Gaussian v in [2^e, 2^(e+1)], by a sum over v."""
    v = np.linspace(1e-4, 6, 600_000)
    lower = 2.0 ** np.floor(np.log2(v))
    density = np.exp(-(v**2) / 2) * np.sqrt(2 / np.pi) * (v[1] - v[0])
    return 1 - float(((v - lower) * (2 * lower - v) * density).sum())


def test_the_committed_page_is_that_of_its_records(tmp_path, drawn):
    folder = ROOT / "results" / "codec"
    for log in ("codec.jsonl", "blocks.jsonl"):
        (tmp_path / log).write_bytes((folder / log).read_bytes())
    assert bench_codec.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()
    assert len(drawn["codec"].axes) == 2
