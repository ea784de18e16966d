"""What a GPU has to show: `python scripts/gpu/run.py`, or `make gpu`; minutes on one GPU.

    tests      those marked `cuda`
    verify     scripts/verify.py with two workers that share the GPU
    steps      a step of 124M by phases for each compressor, torch.optim.Muon and AdamW
    training   300 steps of 124M on Shakespeare in GPT-2's tokens, two workers on one GPU

Records go to the folder `--out`, and from them comes README.md; it says what did not end in time,
and leaves it out. The tokens are made before (`python data/shakespeare.py --gpt2`). On a machine
without a GPU the same parts run on a tiny model, which proves nothing about GPUs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scripts.gpu.report import report
from scripts.studies import OVERRIDES, command, page, read_records

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "results" / "gpu" / "gpu.jsonl"
# Of the runs of `training` the overrides, by name.
RUNS = {
    "uncompressed": ["compressor@w2s=identity"],
    "quantized rank 30 %": ["compressor@w2s=quantized_rank"],
    "AdamW, all-reduce": ["optimizer=adamw"],
    "local, sync every 30, 2 bits": ["optimizer=local"],
}
# To compile the model twice takes longer than 300 steps save.
LARGE = ["model=gpt2-124m", "data=shakespeare_gpt2", "steps=300", "compile=false"]
SMALL = [
    *("model=tiny", "model.layers=1", "batch.micro_size=2", "batch.global_size=4"),
    *("steps=30", "eval.every=15", "eval.tokens=1024", "log_every=5"),  # a round of local steps
]
KEPT = ("run", "train", "eval", "end")  # of a run's log
LEFT_OUT = ("record", "config", "overrides")  # of a record of a run
ENVIRONMENT = {
    **{"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",  # seconds, after which torchrun kills its workers
}
MARK = "mark.cuda"  # in what a file of tests says


@dataclass
class Session:
    """Until when there is time, and what all parts are started with."""

    until: float
    overrides: tuple[str, ...] = ()  # for the runs of `training`
    on_gpu: bool = torch.cuda.is_available()

    def run(self, part: str, *arguments: str | Path) -> tuple[dict, str]:
        """The record of a Python command and what it printed; no status if its time was up."""
        print(f"-- {part}: {' '.join(map(str, arguments))}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryFile("w+") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=file,
                stderr=file,
            )
            try:
                status = process.wait(max(1, self.until - start))
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its workers, which are sessions of their own
                process.wait()
                status = None
            file.seek(0)
            output = file.read()
        seconds = time.monotonic() - start
        lines = output.splitlines()
        print("\n".join(lines[-40:]), flush=True)
        record = {"record": "part", "part": part, "status": status, "seconds": round(seconds, 1)}
        if status:  # torchrun's own lines come after it
            record["error"] = next((line for line in lines if "rror: " in line), "")
        return record, output

    def torchrun(self, part: str, *arguments: str | Path) -> tuple[dict, str]:
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        return self.run(part, *launch, *arguments)


def steps(session: Session) -> Iterator[dict]:
    model = ["model=gpt2-124m", "batch.micro_size=16"] if session.on_gpu else ["model=tiny"]
    repeats = "--steps=10" if session.on_gpu else "--steps=1"
    with tempfile.TemporaryDirectory() as folder:
        part, _ = session.run("steps", "scripts/gpu/steps.py", "--out", folder, repeats, *model)
        yield from (*read_records(Path(folder, "steps.jsonl")), part)


def tests(session: Session) -> Iterator[dict]:
    marked = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if MARK in p.read_text())
    part, output = session.run("tests", "-m", "pytest", "-q", "-m", "cuda", *marked)
    lines = output.splitlines() or ["nothing"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield part
    yield {"record": "tests", "summary": lines[-1].strip("= "), "failed": failed}


def verify(session: Session) -> Iterator[dict]:
    part, output = session.torchrun("verify", "scripts/verify.py")
    lines = output.splitlines()
    summary = "".join(line for line in lines if "claims fail" in line) or "not ended"
    failed = [line for line in lines if line.endswith("FAIL")]
    yield part
    yield {"record": "verify", "summary": summary, "failed": failed}


def training(session: Session) -> Iterator[dict]:
    common = [*(LARGE if session.on_gpu else SMALL), "transport=host", "checkpoint.every=0"]
    for name, own in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            overrides = [*common, *session.overrides, *own, f"directory={folder}/run"]
            part, _ = session.torchrun(name, "train.py", *overrides)
            yield part
            for one in read_records(Path(folder, "run", "metrics.jsonl")):
                if one["record"] in KEPT:
                    numbers = {key: value for key, value in one.items() if key not in LEFT_OUT}
                    yield {"record": "training", "run": name, "of": one["record"]} | numbers


PARTS = {"steps": steps, "tests": tests, "verify": verify, "training": training}
OPTIONS = {
    **OVERRIDES,
    "--parts": {"nargs": "+", "choices": PARTS, "default": [*PARTS], "help": "in this order"},
    "--minutes": {"type": float, "default": 9, "help": "at most"},
}


def facts() -> dict:
    found = {"record": "facts", "torch": torch.__version__, "cores": os.cpu_count()}
    if not torch.cuda.is_available():
        return found | {"device": "CPU"}
    properties = torch.cuda.get_device_properties(0)
    memory = {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found | {"device": properties.name} | memory


def measure(options: argparse.Namespace) -> Iterator[dict]:
    session = Session(time.monotonic() + 60 * options.minutes, options.overrides)
    yield facts()
    for part in options.parts:
        yield from PARTS[part](session)


if __name__ == "__main__":
    sys.exit(command(__doc__, LOG, measure, page(partial(report, names=RUNS)), OPTIONS))
