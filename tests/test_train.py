"""train.py in real processes: logs, bytes, determinism, sweeps, failures."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from logs import repeatable
from run import before_torchrun, launch
from workers.resume import run_alone

BOTH = ["compressor@w2s=topk", "compressor@s2w=topk", "w2s.fraction=0.1"]


def records(runs: Path, kind: str | None = None) -> list[dict]:
    """The records of the only run below `runs`."""
    (path,) = runs.glob("*/metrics.jsonl")
    every = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in every if kind in (None, record["record"])]


@pytest.fixture(scope="module")
def two_workers(small, tmp_path_factory):
    """A run on two workers, TopK + natural to the server and back, and its standard output."""
    runs = tmp_path_factory.mktemp("runs")
    result = launch(2, *small, *BOTH, f"runs={runs}")
    return runs, result.stdout


def test_the_log_has_the_documented_fields(two_workers):
    runs, _ = two_workers
    run, *middle, end = records(runs)
    assert (run["record"], run["schema"], run["world_size"]) == ("run", 1, 2)
    assert run["config"]["w2s"]["fraction"] == 0.1
    assert run["parameters"] == 256 * 32 + 12 * 32 * 32
    trains = [r for r in middle if r["record"] == "train"]
    evals = [r for r in middle if r["record"] == "eval"]
    of_bytes = {"w2s_bytes", "s2w_bytes", "received_bytes", "wire_tx_bytes"}
    position = {"step", "round", "tokens", "seconds"} | of_bytes
    assert all(set(r) == {"record", "loss", "lr", "phases"} | position for r in trains)
    assert all(set(r) == {"record", "test_loss"} | position for r in evals)
    phases = {"forward_backward", "encode", "exchange", "server", "decode", "data"}
    assert all(set(r["phases"]) == phases for r in trains)
    assert [r["step"] for r in trains] == [1, 2, 3, 4]
    assert [r["step"] for r in evals] == [2, 4]
    assert [r["tokens"] for r in trains] == [128, 256, 384, 512]
    seconds = [r["seconds"] for r in (*trains, end)]
    assert seconds[0] > 0 and seconds == sorted(seconds), "of training since the start"
    (path,) = runs.glob("*/metrics.jsonl")
    lasted = path.stat().st_mtime - datetime.fromisoformat(run["started"]).timestamp()
    assert sum(trains[-1]["phases"].values()) <= seconds[-1] <= lasted + 1
    assert 0 < end["optimizer_share"] < 1
    assert (end["record"], end["status"]) == ("end", "completed")


def elias_fano_bits(universe: int, k: int) -> int:
    """The size of the shortest Elias-Fano code, each of its two parts in whole bytes."""

    def byte(bits):
        return -(-bits // 8) * 8

    return min(byte(k * low) + byte(k + ((universe - 1) >> low)) for low in range(20))


def top_natural_bytes(entries: int, fraction: float) -> int:
    k = round(entries * fraction)
    return elias_fano_bits(entries, k) // 8 + k + -(-k // 8)


def test_logged_bytes_are_the_sum_of_the_payloads(two_workers):
    runs, stdout = two_workers
    shapes = [256 * 32, *4 * [32 * 32], *2 * [4 * 32 * 32]]
    up = sum(top_natural_bytes(entries, 0.1) for entries in shapes)
    down = sum(top_natural_bytes(entries, 0.15) for entries in shapes)
    for record in records(runs, "train"):
        assert record["w2s_bytes"] == record["step"] * up
        assert record["s2w_bytes"] == record["step"] * down
        assert 0 < record["wire_tx_bytes"] < record["step"] * (up + down)
    sent, received = 4 * up, records(runs, "end")[0]["received_bytes"]
    uncompressed = 4 * 2 * 4 * (256 * 32 + 12 * 32 * 32)  # 4 steps, both ways, 4 bytes
    for size in (sent, received, uncompressed):
        assert f"{size:,} bytes" in stdout
    assert f"{uncompressed / (sent + received):.1f}x less\n" in stdout


def test_a_run_leaves_its_configuration_and_pictures(two_workers):
    runs, stdout = two_workers
    (directory,) = runs.iterdir()
    names = {path.name for path in directory.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "test_loss.png", "test_loss.svg"}
    assert names == files | {"checkpoints"}
    assert f"log      {directory}/metrics.jsonl" in stdout
    assert f"picture  {directory}/test_loss.png" in stdout
    assert "2 workers on cpu, " in stdout and "top 10% natural" in stdout


def test_the_same_seed_gives_the_same_log(small, tmp_path):
    """In processes that are started anew, as all are without tests, and in this one."""
    launch(1, *small, *BOTH, f"directory={tmp_path}/anew", "checkpoint.every=1", fresh=True)
    run_alone(tmp_path / "here", *small, *BOTH)
    first, second = (repeatable(tmp_path / name) for name in ("anew", "here"))
    assert first == second
    assert sum("loss" in record for record in first) == 4


def test_a_sweep_is_one_launch_that_can_be_continued(small, tmp_path):
    arguments = [
        *("-m", *small, "steps=2", f"runs={tmp_path}", "fail_fast=false"),
        *("compressor@w2s=identity,topk", "optimizer.momentum=0.5,7"),
    ]
    result = launch(2, *arguments, expect=1)
    finished = sorted(path.parent for path in tmp_path.glob("*/test_loss.png"))
    assert [p.name.split("w2s=")[1].split(",")[0] for p in finished] == ["identity", "topk"]
    assert "job 2 of 2" in result.stdout  # those that cannot be built are named before
    assert result.stdout.count("already completed: skipped") == 0
    assert result.stderr.count("passed over") == 2
    assert "2 jobs failed" in result.stderr and "momentum=7 is not allowed" in result.stderr
    assert "Traceback" not in before_torchrun(result.stderr)

    log = finished[0] / "metrics.jsonl"
    kept = log.stat().st_mtime_ns
    cut = finished[1] / "metrics.jsonl"
    cut.write_text("\n".join(cut.read_text().splitlines()[:-1]) + "\n")
    result = launch(2, *arguments, expect=1)
    assert result.stdout.count("already completed: skipped") == 1
    assert log.stat().st_mtime_ns == kept
    assert '"status": "completed"' in cut.read_text().splitlines()[-1]
    assert sorted(path.parent for path in tmp_path.glob("*/test_loss.png")) == finished


def test_a_failing_job_stops_the_sweep(small, tmp_path):
    result = launch(
        0, "-m", *small, f"runs={tmp_path}", "optimizer.lr=1e38,0.02", "steps=3", expect=1
    )
    (log,) = tmp_path.glob("*/metrics.jsonl")
    end = json.loads(log.read_text().splitlines()[-1])
    assert (end["record"], end["status"]) == ("end", "failed")
    assert "was not finite at step 2" in end["error"]
    assert "error: the gradient of" in result.stderr and "Traceback" not in result.stderr


def test_on_many_workers_a_mistake_is_printed_once(small, tmp_path):
    result = launch(2, *small, "w2s.fraction=2", f"runs={tmp_path}", expect=1)
    assert result.stderr.count("error: w2s: QuantizedRank got fraction=2") == 1
    assert "Traceback" not in before_torchrun(result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_single_runs_never_overwrite_one_another(small, tmp_path):
    for _ in range(2):
        launch(0, *small, "steps=1", f"runs={tmp_path}")
    first, second = sorted(path.name for path in tmp_path.iterdir())
    assert second == f"{first}-2"


def test_wandb_offline_mirrors_the_log(small, tmp_path):
    launch(0, *small, "steps=2", "wandb.mode=offline", f"runs={tmp_path}")
    (directory,) = tmp_path.iterdir()
    (mirror,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    content = mirror.read_bytes()
    assert all(name in content for name in (b"test_loss", b"w2s_bytes", b"wire_tx_bytes"))
