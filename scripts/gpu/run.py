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
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ef21_muon.checks import renamed
from scripts.studies import OVERRIDES, command, markdown, page, read_records, select
from training.config import ROOT
from training.renamed import modern_label

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
PHASES = ("forward_backward", "encode", "exchange", "decode", "server")
NOT_A_GPU = (
    "\n**These records were made without a GPU, on a tiny model: they prove nothing about GPUs, "
    "only that the script runs.**\n"
)


@dataclass
class Session:
    """Until when there is time, and what all parts are started with."""

    until: float
    overrides: tuple[str, ...] = ()  # for the runs of `training`
    on_gpu: bool = torch.cuda.is_available()

    def run(self, part: str, *arguments: str | Path) -> tuple[dict, list[str]]:
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
            lines = file.read().splitlines()
        seconds = time.monotonic() - start
        print("\n".join(lines[-40:]), flush=True)
        record = {"record": "part", "part": part, "status": status, "seconds": round(seconds, 1)}
        if status:  # torchrun's own lines come after it
            record["error"] = next((line for line in lines if "rror: " in line), "")
        return record, lines

    def torchrun(self, part: str, *arguments: str | Path) -> tuple[dict, list[str]]:
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        return self.run(part, *launch, *arguments)


def steps(session: Session) -> Iterator[dict]:
    model = ["model=gpt2-124m", "batch.micro_size=16"] if session.on_gpu else SMALL[:2]
    repeats = "--steps=10" if session.on_gpu else "--steps=1"
    with tempfile.TemporaryDirectory() as folder:
        part, _ = session.run("steps", "scripts/gpu/steps.py", "--out", folder, repeats, *model)
        yield from (*read_records(Path(folder, "steps.jsonl")), part)


def tests(session: Session) -> Iterator[dict]:
    marked = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if MARK in p.read_text())
    part, lines = session.run("tests", "-m", "pytest", "-q", "-m", "cuda", *marked)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield part
    yield {"record": "tests", "summary": (lines or ["nothing"])[-1].strip("= "), "failed": failed}


def verify(session: Session) -> Iterator[dict]:
    part, lines = session.torchrun("verify", "scripts/verify.py")
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


def report(records: list[dict]) -> str:
    records = [*map(modern, records)]
    facts, *_ = select(records, record="facts")
    steps, training = select(records, record="step"), select(records, record="training")
    what = f"{facts['device']}, torch {facts['torch']}, {facts['cores']} cores"
    parts = select(records, record="part")
    lasted = "; ".join(f"{part['part']} {_end(part)}" for part in parts)
    tests = [
        line for one in select(records, record="tests") for line in (one["summary"], *one["failed"])
    ]
    claims = [
        f"`scripts/verify.py` with two workers that share the GPU: {one['summary']}."
        + "".join(f" `{line}`" for line in one["failed"])
        for one in select(records, record="verify")
    ]
    return f"""# What a GPU has shown

`make gpu` on one machine: {what}.
{"" if "cuda" in facts else NOT_A_GPU}
Parts and their seconds: {lasted}.

## Tests and claims

Tests marked `cuda`: {chr(10).join(tests) or "not run."}

{chr(10).join(claims) or "Claims: not run."}

## A step

One worker alone, gradients of {steps[0]["tokens"] if steps else 0}
tokens; medians, in ms, by events on the device. *ms* is the whole step on the host's clock, from
idle to idle. State is what stays allocated of the optimizer, peak what a step allocates beyond.
*Host waits* is what torch says of a step that waits for the device; none may.

{step_table(steps)}

## Two workers on one GPU

Messages go through pinned host memory (`transport=host`), 300 steps of 124M on Shakespeare in
GPT-2's tokens, and nothing is compiled. Milliseconds are of a step in the second half, evaluations
left out; phases are rank 0's, by events on the device, so that its waiting for a message is in the
whole step alone.

{training_table(training, parts)}

{commits(training)}
"""


def modern(record: dict) -> dict:
    """A record of any version, with the names of today's runs and compressors."""
    new = {key: modern_label(record[key]) for key in ("run", "part") if key in record}
    if "method" in record:
        new["method"] = renamed.SPECS.get(record["method"], record["method"])
    return record | new


def _end(part: dict) -> str:
    failed = f" (exit {part['status']}: {part.get('error') or 'no line says why'})"
    why = {0: "", None: " (time was up)"}.get(part["status"], failed)
    return f"{part['seconds']:.0f}{why}"


def step_table(steps: list[dict]) -> str:
    rows = [["method", "ms", "encode", "decode", "server", "state MB", "peak MB", "host waits"]]
    for one in steps:
        phases = one["phases_ms"]
        shown = [f"{phases[p]:.2f}" if p in phases else "" for p in ("encode", "decode", "server")]
        state = f"{one['state_bytes'] / 1e6:.0f}" if "state_bytes" in one else ""
        peak, waits = f"{one['peak_bytes'] / 1e6:.0f}", one["waits"] or "none"
        rows.append([one["method"], f"{one['ms']:.2f}", *shown, state, peak, waits])
    return markdown(rows)


def training_table(records: list[dict], parts: list[dict]) -> str:
    heading = ["run", "test loss", "bytes sent", "ms per step"]
    rows = [[*heading, *(phase.replace("_", ", ") for phase in PHASES)]]
    for name in RUNS:
        trained, ends = (select(records, run=name, of=kind) for kind in ("train", "end"))
        if not ends or "test_loss" not in ends[-1]:
            why = _why_not(trained, ends, select(parts, part=name))
            rows.append([name, why, *[""] * (len(rows[0]) - 2)])
            continue
        first, last = trained[(len(trained) - 1) // 2], trained[-1]
        spent = [last["seconds"] - first["seconds"]]
        spent += [last["phases"][phase] - first["phases"][phase] for phase in PHASES]
        between = max(1, last["step"] - first["step"])
        loss, sent = f"{ends[-1]['test_loss']:.4f}", f"{ends[-1]['w2s_bytes']:,}"
        rows.append([name, loss, sent, *(f"{1000 * one / between:.1f}" for one in spent)])
    return markdown(rows)


def _why_not(trained: list[dict], ends: list[dict], part: list[dict]) -> str:
    """Why a run has no test loss at its end."""
    for one in (*ends, *part):
        if one.get("error"):
            return f"failed: {one['error'].removeprefix('error: ').partition(':')[0]}"
    return "did not end" if trained or part else "not run"


def commits(records: list[dict]) -> str:
    """Which versions the runs are of."""
    versions = {one["run"]: one["commit"] for one in records if "commit" in one}
    runs = "; ".join(f"{run}: {commit}" for run, commit in versions.items())
    joined = "Joined of several calls of `make gpu`, on machines alike. "
    return f"{joined if len({*versions.values()}) > 1 else ''}{runs}"


if __name__ == "__main__":
    sys.exit(command(__doc__, LOG, measure, page(report), OPTIONS))
