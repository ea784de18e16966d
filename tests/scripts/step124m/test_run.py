"""The benchmark of a step, on two workers with a small model."""

import json
from math import prod
from pathlib import Path

import pytest
from run import torchrun

from ef21_muon.compressors.indices import index_bytes
from scripts.step124m import run as bench_step

SCRIPT = Path(bench_step.__file__)
RANKS, WIDTH, VOCABULARY, CONTEXT = 2, 32, 256, 32
ATTENTION = [(4, WIDTH, WIDTH)]
MLP = [(1, 4 * WIDTH, WIDTH), (1, WIDTH, 4 * WIDTH)]
EMBEDDING = (1, VOCABULARY, WIDTH)
PARAMETERS = sum(map(prod, [*ATTENTION, *MLP, EMBEDDING]))
PHASES = {"state", "encode", "exchange", "server", "decode"}


@pytest.fixture(scope="module")
def measured(small, tmp_path_factory):
    """Its records by method and phase, of both ranks, and its README.md."""
    directory = tmp_path_factory.mktemp("step")
    overrides = (*small, "optimizer.server=sharded")
    torchrun(str(SCRIPT), "--steps=1", f"--out={directory}", *overrides, ranks=RANKS)
    records = {}
    for line in (directory / "step124m.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault((record["method"], record["phase"]), []).append(record)
    return records, (directory / "README.md").read_text()


def test_every_phase_is_measured_on_both_ranks(measured):
    records, text = measured
    expected = {(bench_step.GRADIENT, "forward_backward")}
    expected |= {(method, phase) for method in bench_step.METHODS for phase in PHASES}
    others = bench_step.ADAMW, bench_step.MUON
    expected |= {(method, phase) for method in others for phase in ("state", "step")}
    assert records.keys() == expected
    for (_, phase), of_ranks in records.items():
        assert [record["rank"] for record in of_ranks] == [0, 1]
        for record in of_ranks:
            assert record["parameters"] == PARAMETERS
            if phase != "state":
                assert record["seconds"] >= 0
                assert 0 < record["largest_bytes"] <= record["peak_bytes"]
                assert f"| {record['method']} | {phase.replace('_', ', ')} | `" in text


def test_the_state_is_what_the_algorithm_needs(measured):
    """M_j and G_j on every rank, G on one, and X where s2w is lossy; two moments, one momentum."""
    records, _ = measured
    for method in bench_step.METHODS:
        state = [record["state_bytes"] for record in records[method, "state"]]
        served = 2 if method.endswith("both ways") else 1
        # Less than a layer off: what a thread of gloo's frees last, the profiler does not see.
        assert sum(state) == pytest.approx(4 * PARAMETERS * (2 * RANKS + served), abs=4000)
        assert max(state) - min(state) < 4 * PARAMETERS * served
    for record in records[bench_step.ADAMW, "state"]:
        assert record["state_bytes"] == pytest.approx(8 * PARAMETERS, abs=1000)
    for record in records[bench_step.MUON, "state"]:
        assert record["of_parameters"] == 12 * WIDTH**2
        assert record["state_bytes"] == pytest.approx(4 * 12 * WIDTH**2, abs=1000)


def test_memory_is_what_must_be_there(measured):
    """Logits, gradients, and the uncompressed message, of which others' parts are received."""
    records, _ = measured
    (gradient, _) = records[bench_step.GRADIENT, "forward_backward"]
    assert gradient["largest_bytes"] >= 4 * CONTEXT * VOCABULARY
    assert gradient["peak_bytes"] >= 4 * PARAMETERS
    for record in records["identity", "exchange"]:
        assert record["peak_bytes"] >= 4 * PARAMETERS
    for record in records["rank 15% natural", "encode"]:
        assert 4 * prod(EMBEDDING) <= record["largest_bytes"] < 4 * PARAMETERS
    for record in records["top 15% natural", "encode"]:
        kept = round(0.15 * prod(EMBEDDING))
        assert record["peak_bytes"] >= index_bytes(prod(EMBEDDING), kept) + kept
