"""Runs on two nodes that differ: `apart.py FOLDER OVERRIDE...`, each rank in FOLDER/node<rank>.

Writes what each case is answered, as JSON, into FOLDER/answers<rank>.json. Tokens are given as
/proc/self/cwd/..., which is another file for each rank.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

import train
import training.config
import training.log
from training.arguments import parse_arguments
from training.sweep import run_jobs
from training.workers import RunError, Workers, exit_process

OWN_TOKENS = "data.train=/proc/self/cwd/train.bin"
CASES = {  # overrides, and what is patched on rank 1
    "folder": (["runs=runs"], {}),
    "folder to go on in": (["directory=run", "resume=auto"], {}),
    "folder that both have": (["directory=both", "resume=auto"], {}),
    "folder that is closed": (["directory=/proc/self/cwd/../run", "resume=auto"], {"touch": "X"}),
    "no checkpoints": (["runs=runs", "checkpoint.every=0"], {}),
    "tokens": ([OWN_TOKENS, "runs=FOLDER/runs"], {}),
    "test tokens": (["data.test=/proc/self/cwd/test.bin", "runs=FOLDER/runs"], {}),
    "class": (["compressor@w2s=topk", "w2s._target_=mine.Mine", "runs=FOLDER/runs"], {}),
    "module of a class": (
        ["compressor@w2s=topk", "w2s._target_=within.Mine", "runs=FOLDER/runs"],
        {},
    ),
    "class on rank 0 alone": (
        ["compressor@w2s=topk", "w2s._target_=only0.Mine", "runs=FOLDER/runs"],
        {},
    ),
    "class on rank 1 alone": (
        ["compressor@s2w=topk", "s2w._target_=only1.Mine", "runs=FOLDER/runs"],
        {},
    ),
    "inner class on rank 1 alone": (
        [
            "optimizer=local",
            "optimizer.sync_every=1",
            "optimizer.inner._target_=only1.Mine",
            "runs=FOLDER/runs",
        ],
        {},
    ),
    "tokens on rank 0 alone": (["data.train=/proc/self/cwd/only0.bin", "runs=FOLDER/runs"], {}),
    "tokens on rank 1 alone": (["data.test=/proc/self/cwd/only1.bin", "runs=FOLDER/runs"], {}),
    "torch": (["runs=FOLDER/runs"], {"torch": "1.0.0"}),
    "torch for another device": (["runs=FOLDER/runs", "seed=1"], {"torch": "VERSION+cu999"}),
    "code": (["runs=FOLDER/runs"], {"code": "mine.py"}),
    "nothing": (["runs=FOLDER/runs"], {}),
}


def patched(rank: int, what: dict):
    if rank == 0 or not what:
        return mock.patch.object(train, "__doc__", train.__doc__)
    ((name, value),) = what.items()
    if name == "torch":
        version = value.replace("VERSION", torch.__version__.partition("+")[0])
        return mock.patch.object(torch, "__version__", version)
    if name == "code":
        return mock.patch.object(training.log, "__file__", str(Path(value).resolve()))
    return mock.patch.object(Path, "touch", side_effect=PermissionError(13, "Permission denied"))


def work(workers: Workers, folder: Path, common: list[str]) -> int:
    answers = {}
    os.chdir(folder / f"node{workers.rank}")
    sys.path.insert(0, os.getcwd())
    for case, (overrides, what) in CASES.items():
        overrides = [one.replace("FOLDER", str(folder)) for one in (*common, *overrides)]
        try:
            with patched(workers.rank, what):
                run_jobs(parse_arguments(overrides), workers, train.Run, train.run_job)
            answers[case] = "completed"
        except RunError as error:
            answers[case] = str(error)
        for name in ("mine", "within", "helper", "only0", "only1"):
            sys.modules.pop(name, None)
    (folder / f"answers{workers.rank}.json").write_text(json.dumps(answers))
    return 0


if __name__ == "__main__":
    directory, *given = sys.argv[1:]
    workers = Workers()
    with mock.patch("training.nodes.SEEN_WITHIN", 0.2):
        exit_process(workers.run(lambda: work(workers, Path(directory), given)))
