"""Logs of runs: what of them repeats, and small ones that are made up."""

import json
from pathlib import Path

RUN = {"record": "run", "schema": 1, "label": "rank 15% natural", "parameters": 100}
TRAIN = {"record": "train", "step": 1, "tokens": 50, "loss": 5.0}
END = {"record": "end", "status": "completed"}


def what_must_repeat(record: dict) -> dict:
    """A record without its times, and without the configuration, which names the run's folder."""
    varying = ("seconds", "phases", "started", "optimizer_share", "config", "overrides")
    return {key: value for key, value in record.items() if key not in varying}


def repeatable(directory: Path) -> list[dict]:
    """The records of a run, without what varies."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [what_must_repeat(json.loads(line)) for line in lines]


def evaluation(step, loss, sent):
    return {
        "record": "eval",
        "step": step,
        "tokens": 50 * step,
        "test_loss": loss,
        "w2s_bytes": sent,
    }


EVALS = [evaluation(0, 5.5, 0), evaluation(10, 3.0, 2_000), evaluation(20, 2.0, 4_000)]


def write_log(directory, *records, tail=""):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def study_records(losses, bytes_a_step=40, **first):
    """A log with an evaluation every 10 steps of 5 tokens."""
    records = [{"record": "run", "schema": 1, "label": "x", "parameters": 100} | first]
    for place, loss in enumerate(losses, 1):
        step = 10 * place
        facts = {"step": step, "tokens": 5 * step, "w2s_bytes": bytes_a_step * step}
        facts |= {"s2w_bytes": 2 * bytes_a_step * step, "test_loss": loss, "seconds": 1.5}
        records += [{"record": "train", "step": step}, {"record": "eval", **facts}]
    return [*records, {"record": "end", "status": "completed"}]


def write_study(directory, runs):
    """Logs as scripts/shakespeare/run.py keeps them, of {name of a run: records}."""
    from scripts.shakespeare.run import RUNS, cut

    directory.mkdir(parents=True, exist_ok=True)
    for run in (run for run in RUNS if run.name in runs):
        with (directory / f"{run.file}.jsonl").open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in cut(run.name, runs[run.name]))
    return directory
