"""Run the study of results/shakespeare, or what is missing of it.

    python scripts/shakespeare/run.py [--only TEXT ...] [--processes N] [--list]

With torchrun, on two workers but where more are studied; one training at a time, or as many as have
N processes in all, on a GPU that they share. What a run prints goes to runs/shakespeare. Runs that
are of a GPU are left out without one, and others do not use it, but for those of larger models,
which are in bfloat16 on either. A run that is in results/shakespeare/logs is skipped; one that was
interrupted resumes from its checkpoint. Logs are cut to what is used, and not edited. The runs and
their overrides are in runs.py beside this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.files import whole_file
from data.genres import SHARDS, prepare
from scripts.shakespeare.results import LOGS
from scripts.shakespeare.runs import SEEDS, STUDY, Setting
from scripts.studies import read_records
from training.config import AS_BEFORE, ROOT, compose, what_matters
from training.records import LOG_NAME
from training.renamed import modern_config

PRINTED = "printed.txt"  # in a run's directory
POLL = 0.2  # seconds
TOP_30 = {"_target_": "ef21_muon.compressors.TopK", "fraction": 0.3, "values": "sign"}
KEPT = ("run", "eval", "end")  # of the records of a log
# Of their fields.
OF_EVALS = ["record", "step", "tokens", "w2s_bytes", "s2w_bytes", "received_bytes", "test_loss"]


@dataclass(frozen=True)
class StudyRun:
    """A setting with one of its seeds, and the file that its log is kept in."""

    setting: Setting
    seed: int
    file: str

    @property
    def name(self) -> str:
        return f"{self.setting.name}-seed{self.seed}"

    @property
    def log(self) -> Path:
        return LOGS / f"{self.file}.jsonl"

    @property
    def directory(self) -> Path:
        """Where it trains."""
        return ROOT / "runs" / "shakespeare" / self.name

    @property
    def overrides(self) -> tuple[str, ...]:
        """All that its command line overrides."""
        place = (f"directory=runs/shakespeare/{self.name}", "resume=auto")
        own = self.setting.overrides.split()
        return ("experiment=shakespeare", *own, f"seed={self.seed}", *place)


RUNS = [
    StudyRun(setting, seed, file)
    for seed in SEEDS
    for file, settings in STUDY.items()
    for setting in settings
    if seed in setting.seeds
]


def require_same(run: StudyRun, config: dict) -> None:
    """Raise ValueError if the run's log is of another configuration."""
    made = as_sent(what_matters(modern_config(config)))
    asked = what_matters(OmegaConf.to_container(compose(run.overrides).config, resolve=True))
    for key in ("optimizer.server", "compile"):  # they take the same steps
        asked.pop(key, None)
    # A later version may have other keys, but a role's compressor is there where it was asked for,
    # and so is what is not as it was before there was a choice. Logs lack a GPU's
    # default precision.
    chosen = {
        key
        for key in asked.keys() | made.keys()
        if key.startswith("norm.") or key.rpartition(".")[2] in AS_BEFORE.keys() - {"precision"}
    }
    differing = [
        f"{key}={asked.get(key)!r} (the log has {made.get(key)!r})"
        for key in sorted(asked.keys() & made.keys() | chosen)
        if asked.get(key) != made.get(key)
    ]
    if differing:
        raise ValueError(
            f"{run.name} in {run.log}: {', '.join(differing)}; remove its lines, or mend runs.py"
        )


def as_sent(config: dict) -> dict:
    """What matters of a log, in the words of today.

    SignMuon was a class of its own. The largest 30 % of entries in signs are the signs of all, see
    ASKED_FOR: their places took more bytes than those.
    """
    if config["optimizer._target_"] == "baselines.SignMuon":
        config |= {"optimizer._target_": "ef21_muon.EF21Muon", "optimizer.lmo": "workers"}
    if any(config.get(f"w2s.{key}") != value for key, value in TOP_30.items()):
        return config
    kept = {key: value for key, value in config.items() if key.removeprefix("w2s.") not in TOP_30}
    return kept | {"w2s._target_": "ef21_muon.compressors.Quantize", "w2s.values": "sign"}


def missing_of(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """Those without a log. Raises ValueError if a log is of another configuration."""
    logs = dict.fromkeys(run.log for run in runs)
    records = (record for log in logs for record in read_records(log))
    made = {one["name"]: one["config"] for one in records if one["record"] == "run"}
    for run in (run for run in runs if run.name in made):
        require_same(run, made[run.name])
    return [run for run in runs if run.name not in made]


def start(run: StudyRun) -> subprocess.Popen:
    """Its training, begun. Raises RuntimeError where its text cannot be fetched."""
    if f"data.train=data/{SHARDS.name}/" in run.setting.overrides:
        prepare(SHARDS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={run.setting.workers}", "train.py", *run.overrides]
    devices = {"CUDA_VISIBLE_DEVICES": ""} if run.setting.device == "cpu" else {}
    run.directory.mkdir(parents=True, exist_ok=True)
    with (run.directory / PRINTED).open("a") as file:
        places = {"stdout": file, "stderr": file}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | devices, **places)


def finish(run: StudyRun, training: subprocess.Popen) -> None:
    """When its training has ended, keep the log in place of what its file has of the run.

    Raises CalledProcessError when the training failed, ValueError if it was stopped.
    """
    if status := training.wait():
        raise subprocess.CalledProcessError(status, training.args)
    records = cut(run.name, read_records(run.directory / LOG_NAME))
    others = [record for record in read_records(run.log) if record["name"] != run.name]
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(run.log, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in others + records)
    shutil.rmtree(run.directory / "checkpoints", ignore_errors=True)


def cut(name: str, records: Sequence[dict]) -> list[dict]:
    """What is used of a log, with the run's name. Raises ValueError if it has no end."""
    if records[-1]["record"] != "end" or records[-1]["status"] != "completed":
        raise ValueError("the run was stopped: start the study again to resume")
    return [
        {"name": name} | {k: v for k, v in one.items() if k in OF_EVALS or one["record"] != "eval"}
        for one in records
        if one["record"] in KEPT
    ]


def train(runs: Sequence[StudyRun], processes: int) -> None:
    """Train with at most so many workers at a time, but one run at least: the first that fits.

    Raises after the last one what one has failed with.
    """
    waiting, training, failed = list(runs), {}, None
    while waiting or training:
        for run in list(waiting):
            busy = sum(run.setting.workers for run in training)
            if not training or busy + run.setting.workers <= processes:
                waiting.remove(run)
                training[run] = start(run)
                print(f"{run.name}: started, {len(waiting)} to come", flush=True)
        time.sleep(POLL)
        for run in [run for run, process in training.items() if process.poll() is not None]:
            try:
                finish(run, training.pop(run))
                print(f"{run.name}: done", flush=True)
            except (ValueError, OSError, subprocess.CalledProcessError) as error:
                failed = error
                print(f"{run.name}: failed, see {run.directory / PRINTED}", flush=True)
    if failed:
        raise failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="runs whose name contains a TEXT"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="workers at once, of all runs"
    )
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    options = parser.parse_args(arguments)
    chosen = list(dict.fromkeys(r for text in options.only for r in RUNS if text in r.name))
    try:
        missing = missing_of(chosen)
        if options.list:
            for run in chosen:
                print(f"{'missing' if run in missing else 'done   '}  {run.name}")
            return 0
        if not torch.cuda.is_available():
            left = [run.name for run in missing if run.setting.device == "cuda"]
            missing = [run for run in missing if run.setting.device != "cuda"]
            if left:
                print(f"left for a machine with a GPU: {', '.join(left)}")
        train(missing, options.processes)
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
