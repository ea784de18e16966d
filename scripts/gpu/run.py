"""What a GPU has to show: `python scripts/gpu/run.py`, or `make gpu`; minutes on one GPU.

    tests      those marked `cuda`
    verify     scripts/verify.py with two workers that share the GPU
    steps      a step of 124M by phases for each compressor, torch.optim.Muon and AdamW
    training   300 steps of 124M on Shakespeare in GPT-2's tokens, two workers on one GPU

Records go to the folder `--out`, and from them comes README.md; it says what did not end
in time, and leaves it out. It needs no package index: torch, numpy, matplotlib, tqdm, pytest and
hypothesis have to be there, and the pure-Python wheels hydra-core, omegaconf and
antlr4-python3-runtime are taken from the folder `--wheels`; the tokens are made elsewhere (`python
data/shakespeare.py --gpt2`). On a machine without a GPU the same parts run on a tiny model, which
proves nothing about GPUs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "results" / "gpu"
LOG = "gpu.jsonl"
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
    "model=tiny",
    "model.layers=1",
    "steps=30",  # a round of local steps
    "eval.every=15",
    "eval.tokens=1024",
    "log_every=5",
    "batch.micro_size=2",
    "batch.global_size=4",
]
KEPT = ("run", "train", "eval", "end")  # of a run's log
MARK = "mark.cuda"  # in what a file of tests says


@dataclass
class Session:
    """Where records go, and until when there is time."""

    out: Path
    until: float
    environment: dict[str, str]
    overrides: list[str] = field(default_factory=list)  # for the runs of `training`
    on_gpu: bool = field(default_factory=torch.cuda.is_available)

    @property
    def log(self) -> Path:
        return self.out / LOG

    def write(self, record: dict) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def run(self, part: str, *command: str | Path) -> tuple[int | None, str]:
        """The exit status of a Python command and what it printed; None if its time was up."""
        print(f"-- {part}: {' '.join(map(str, command))}", flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=max(1, self.until - start))
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers, which are sessions of their own
            output, _ = process.communicate()
            status = None
        seconds = time.monotonic() - start
        print("\n".join(output.splitlines()[-40:]), flush=True)
        record = {"record": "part", "part": part, "status": status, "seconds": round(seconds, 1)}
        if status:  # torchrun's own lines come after it
            record["error"] = next((line for line in output.splitlines() if "rror: " in line), "")
        self.write(record)
        return status, output

    def torchrun(self, part: str, workers: int, *command: str | Path) -> tuple[int | None, str]:
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}")
        return self.run(part, *launch, *command)


def tests(session: Session) -> None:
    marked = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if MARK in p.read_text())
    _, output = session.run("tests", "-m", "pytest", "-q", "-m", "cuda", *marked)
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    summary = (output.splitlines() or ["nothing"])[-1].strip("= ")
    session.write({"record": "tests", "summary": summary, "failed": lines})


def verify(session: Session) -> None:
    _, output = session.torchrun("verify", 2, "scripts/verify.py")
    lines = [line for line in output.splitlines() if "claims fail" in line]
    failed = [line for line in output.splitlines() if line.endswith("FAIL")]
    session.write({"record": "verify", "summary": "".join(lines) or "not ended", "failed": failed})


def steps(session: Session) -> None:
    model = ["model=gpt2-124m", "batch.micro_size=16"] if session.on_gpu else ["model=tiny"]
    repeats = ["--steps=10"] if session.on_gpu else ["--steps=1"]
    session.run("steps", "scripts/gpu/steps.py", "--out", session.log, *repeats, *model)


def training(session: Session) -> None:
    common = [*(LARGE if session.on_gpu else SMALL), "transport=host", "checkpoint.every=0"]
    common += session.overrides
    for name, own in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder, "run")
            session.torchrun(name, 2, "train.py", *common, *own, f"directory={directory}")
            if not (log := directory / "metrics.jsonl").exists():
                continue
            for line in log.read_text().splitlines():
                record = json.loads(line)
                if record["record"] in KEPT:
                    session.write({"record": "training", "run": name, "of": record["record"]}
                                 | {key: value for key, value in record.items()
                                    if key not in ("record", "config", "overrides")})  # fmt: skip


PARTS = {"steps": steps, "tests": tests, "verify": verify, "training": training}


def facts() -> dict:
    found = {
        "record": "facts",
        "torch": torch.__version__,
        "device": "CPU",
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda}
    return found


def environment(wheels: Path | None, folder: str) -> dict[str, str]:
    """That of the parts, which find the wheels' packages in the folder."""
    if wheels:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    own["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "5"  # seconds, after which torchrun kills them
    return {**os.environ, **own}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the training runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder (default %(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to take packages from")
    parser.add_argument("--minutes", type=float, default=9, help="at most (default %(default)s)")
    parser.add_argument("--redraw", action="store_true", help="README.md from the records alone")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        where = environment(options.wheels, folder)
        session = Session(options.out, until, where, options.overrides)
        if not options.redraw:
            options.out.mkdir(parents=True, exist_ok=True)
            session.log.unlink(missing_ok=True)
            session.write(facts())
            for part in options.parts:
                PARTS[part](session)
        sys.path.insert(0, folder)
        from scripts.gpu.report import report  # needs the wheels

        records = [json.loads(line) for line in session.log.read_text().splitlines()]
    text = report(records)
    (options.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
