"""scripts/gpu: on this machine without a GPU, and its report."""

import json
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from run import PATIENCE, ROOT

from scripts.gpu import run
from scripts.gpu.run import RUNS, Session, report

FACTS = {"record": "facts", "device": "H100", "torch": "2.9.0", "cores": 8, "cuda": "13.0"}


@pytest.mark.slow
def test_every_part_runs_without_a_gpu_and_says_what_that_proves(tmp_path, small):
    data = [override for override in small if override.startswith("data.")]
    command = [sys.executable, "scripts/gpu/run.py", "--out", tmp_path, "--minutes=20", *data]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    text = (tmp_path / "README.md").read_text()
    assert "prove nothing about GPUs" in text and "0 of 16 claims fail" in text
    assert [part["status"] for part in records if part["record"] == "part"] == [0] * 7
    assert "did not end" not in text and "not run" not in text
    assert_steps_are_measured(records)


def test_a_run_and_the_steps_are_measured_without_a_gpu(small, monkeypatch, forks):
    """What scripts/verify.py and tests marked `cuda` say here, others test."""
    data = [override for override in small if override.startswith("data.")]
    names = [*RUNS][:1]
    monkeypatch.setattr(run, "RUNS", {name: RUNS[name] for name in names})
    parts = ["steps", "training"]
    fewer = ["steps=4", "eval.every=2", "log_every=2", "eval.tokens=320"]
    options = Namespace(parts=parts, minutes=20, overrides=[*data, *fewer])
    records = [json.loads(json.dumps(record)) for record in run.measure(options)]
    text = report(records)
    assert [part["status"] for part in records if part["record"] == "part"] == [0, 0]
    assert "prove nothing about GPUs" in text and "Tests marked `cuda`: not run." in text
    assert f"| {names[0]} | " in text and "did not end" not in text
    assert_steps_are_measured(records)


def assert_steps_are_measured(records: list[dict]) -> None:
    methods = {record["method"]: record for record in records if record["record"] == "step"}
    assert {"identity", "rank", "topk", "torch.optim.AdamW", "forward and backward"} < set(methods)
    assert set(methods["rank"]["phases_ms"]) == {"encode", "exchange", "decode", "server"}
    assert all(record["waits"] is None for record in methods.values())


def test_what_does_not_end_in_time_is_ended_with_its_workers(tmp_path, forks):
    script = tmp_path / "sleeps.py"
    script.write_text(f"import time\ntime.sleep({PATIENCE})\n")
    start = time.monotonic()
    session = Session(start + 2)
    record, _ = session.torchrun("sleep", script)
    assert time.monotonic() - start < PATIENCE / 4
    assert record["part"] == "sleep" and record["status"] is None


def test_a_wait_for_the_device_and_what_did_not_end_are_reported():
    step = {"record": "step", "method": "topk", "ms": 2.0, "phases_ms": {"encode": 1.5}}
    step |= {"peak_bytes": 3e6, "waits": "called a synchronizing CUDA operation", "tokens": 8}
    train = {"record": "training", "run": "uncompressed", "of": "train"}
    part = {"record": "part", "part": "steps", "status": None, "seconds": 9}
    text = report([FACTS, part, step, train])
    assert "| topk | 2.00 | 1.50 |  |  |  | 3 | called a synchronizing CUDA operation |" in text
    assert "steps 9 (time was up)" in text
    assert "| uncompressed | did not end |" in text and "| quantized rank 30 % | not run |" in text
    assert "prove nothing" not in text


def test_milliseconds_of_a_run_are_those_of_its_second_half():
    lines = []
    for step in (10, 20, 30):
        seconds = {10: 100.0, 20: 101.0, 30: 101.5}[step]
        phases = dict.fromkeys(("forward_backward", "encode", "exchange", "decode", "server"), 0.0)
        phases["encode"] = seconds / 2
        lines.append({"record": "training", "run": "uncompressed", "of": "train", "step": step,
                      "seconds": seconds, "phases": phases})  # fmt: skip
    end = {"record": "training", "run": "uncompressed", "of": "end", "test_loss": 3.25}
    text = report([FACTS, *lines, end | {"w2s_bytes": 4000}])
    assert "| uncompressed | 3.2500 | 4,000 | 50.0 | 0.0 | 25.0 | 0.0 | 0.0 | 0.0 |" in text


def test_the_committed_report_is_that_of_the_committed_records():
    folder = ROOT / "results/gpu"
    records = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    assert report(records) == (folder / "README.md").read_text()
    assert "| none |" in report(records) and "synchroniz" not in report(records)
