"""Run the study of results/shakespeare, or what is missing of it.

    python scripts/shakespeare/run.py [--only TEXT ...] [--processes N] [--list]

With torchrun, on two workers but where more are studied; one training at a time, or as many as have
N processes in all, on a GPU that they share. Runs that are of a GPU are left out without one, and
others do not use it, but for those of larger models, which are in bfloat16 on either. A run whose
log is in results/shakespeare is skipped; one that was interrupted resumes from its checkpoint. Logs
are cut to the records that figures need, and are not edited. The runs and their overrides are in
settings.py and conditions.py beside this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from omegaconf import OmegaConf

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.shakespeare.genres import SHARDS, prepare
from scripts.shakespeare.results import RESULTS
from scripts.shakespeare.runs import RUNS, StudyRun
from training.config import AS_BEFORE, ROOT, compose, what_matters
from training.records import LOG_NAME
from training.renamed import modern_config

PRINTED = "printed.txt"  # in a run's directory
POLL = 0.2  # seconds
TOP_30 = {"_target_": "ef21_muon.compressors.TopK", "fraction": 0.3, "values": "sign"}
KEPT = ("run", "eval", "diagnostics", "end")  # of the records of a log


def log_of(run: StudyRun) -> Path:
    """Where the run's log is kept."""
    return RESULTS / f"{run.name}.jsonl"


def overrides(run: StudyRun) -> tuple[str, ...]:
    """All that the run's command line overrides."""
    place = (f"directory=runs/shakespeare/{run.name}", "resume=auto")
    return ("experiment=shakespeare", *run.overrides, *place)


def is_done(run: StudyRun) -> bool:
    """Whether the run's log is there. Raises ValueError if it is of another configuration."""
    path = log_of(run)
    if not path.exists():
        return False
    with path.open() as file:
        made_with = as_sent(what_matters(modern_config(json.loads(file.readline())["config"])))
    asked = what_matters(OmegaConf.to_container(compose(overrides(run)).config, resolve=True))
    for key in ("optimizer.server", "compile"):  # they take the same steps
        asked.pop(key, None)
    # A later version may have other keys, but a role's compressor is there where it was asked for,
    # and so is what is not as it was before there was a choice. Logs lack a GPU's
    # default precision.
    chosen = {
        key
        for key in asked.keys() | made_with.keys()
        if key.startswith("norm.") or key.rpartition(".")[2] in AS_BEFORE.keys() - {"precision"}
    }
    differing = [
        f"{key}={asked.get(key)!r} (the log has {made_with.get(key)!r})"
        for key in sorted(asked.keys() & made_with.keys() | chosen)
        if asked.get(key) != made_with.get(key)
    ]
    if differing:
        raise ValueError(f"{path}: {', '.join(differing)}; remove it, or mend settings.py")
    return True


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


def directory_of(run: StudyRun) -> Path:
    """Where the run trains."""
    return ROOT / "runs" / "shakespeare" / run.name


def start(run: StudyRun, output: IO | None = None) -> subprocess.Popen:
    """Its training, begun. Raises RuntimeError where its text cannot be fetched."""
    if any(override.startswith(f"data.train=data/{SHARDS.name}/") for override in run.overrides):
        prepare(SHARDS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={run.workers}", "train.py", *overrides(run)]
    devices = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if run.device == "cpu" else os.environ
    return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=devices)


def finish(run: StudyRun, training: subprocess.Popen) -> None:
    """Wait for its training, and keep the log.

    Raises CalledProcessError when the training failed, ValueError if it was stopped.
    """
    if status := training.wait():
        raise subprocess.CalledProcessError(status, training.args)
    directory = directory_of(run)
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    log_of(run).write_text(cut((directory / LOG_NAME).read_text()))
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def train_at_once(runs: Sequence[StudyRun], processes: int) -> None:
    """Train with at most so many workers at a time, but one run at least: the first that fits.

    What a run prints goes to its directory. Raises after the last one what one has failed with.
    """
    waiting, training, failed = list(runs), {}, None
    while waiting or training:
        for run in list(waiting):
            busy = sum(run.workers for run in training)
            if not training or busy + run.workers <= processes:
                waiting.remove(run)
                directory_of(run).mkdir(parents=True, exist_ok=True)
                with (directory_of(run) / PRINTED).open("a") as output:
                    training[run] = start(run, output)
        time.sleep(POLL)
        for run in [run for run, process in training.items() if process.poll() is not None]:
            try:
                finish(run, training.pop(run))
            except (ValueError, OSError, subprocess.CalledProcessError) as error:
                failed = error
                print(f"{run.name}: failed, see {directory_of(run) / PRINTED}", flush=True)
            else:
                print(f"{run.name}: done", flush=True)
    if failed:
        raise failed


def cut(log: str) -> str:
    """The lines of a log that figures need, as they are. Raises ValueError if it has no end."""
    lines = log.splitlines(keepends=True)
    kinds = [json.loads(line)["record"] for line in lines]
    if kinds[-1] != "end" or json.loads(lines[-1])["status"] != "completed":
        raise ValueError("the run was stopped: start the study again to resume")
    return "".join(line for kind, line in zip(kinds, lines, strict=True) if kind in KEPT)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="runs whose name contains a TEXT"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="workers at once, of all runs")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    options = parser.parse_args(arguments)
    try:
        chosen = [run for text in options.only for run in RUNS if text in run.name]
        chosen = list(dict.fromkeys(chosen))
        missing = [run for run in chosen if not is_done(run)]
        if options.list:
            for run in chosen:
                print(f"{'missing' if run in missing else 'done   '}  {run.name}")
            return 0
        if not torch.cuda.is_available():
            left = [run.name for run in missing if run.device == "cuda"]
            missing = [run for run in missing if run.device != "cuda"]
            if left:
                print(f"left for a machine with a GPU: {', '.join(left)}")
        if options.processes:
            train_at_once(missing, options.processes)
            return 0
        for number, run in enumerate(missing, 1):
            print(f"\n{run.name} ({number} of {len(missing)})", flush=True)
            finish(run, start(run))
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
