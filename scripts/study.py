"""Run the study of results/shakespeare, or what is missing of it: `python scripts/study.py`.

One training at a time, with torchrun on two workers. A run whose log is in results/shakespeare is
skipped; one that was interrupted goes on from its checkpoint. Logs are cut to the records that
figures need, and are not edited. The runs and their overrides are in scripts/study_runs.py.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    sys.path.insert(0, str(ROOT))

from scripts.study_runs import RUNS, StudyRun

RESULTS = ROOT / "results" / "shakespeare"
WORK = ROOT / "runs" / "shakespeare"
WORKERS = 2
KEPT = ("run", "eval", "diagnostics", "end")  # of the records of a log


def log_of(run: StudyRun) -> Path:
    """Where the run's log is kept."""
    return RESULTS / f"{run.name}.jsonl"


def is_done(run: StudyRun) -> bool:
    """Whether the run's log is there. Raises ValueError if it is of other overrides."""
    path = log_of(run)
    if not path.exists():
        return False
    with path.open() as file:
        overrides = json.loads(file.readline())["overrides"]
    if overrides != list(command_overrides(run)):
        raise ValueError(
            f"{path} is of {' '.join(overrides)}, the study asks for "
            f"{' '.join(command_overrides(run))}: remove it to run it anew, or mend study_runs.py"
        )
    return True


def command_overrides(run: StudyRun) -> tuple[str, ...]:
    """All that the run's command line overrides."""
    return ("experiment=shakespeare", *run.overrides, f"directory=runs/shakespeare/{run.name}")


def train(run: StudyRun) -> None:
    """Train, and keep the log. Raises CalledProcessError when the training fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={WORKERS}", "train.py", *command_overrides(run), "resume=auto"]
    subprocess.run(command, cwd=ROOT, check=True)
    directory = WORK / run.name
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    log_of(run).write_text(cut((directory / "metrics.jsonl").read_text()))
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def cut(log: str) -> str:
    """The lines of a log that figures need, as they are."""
    lines = log.splitlines(keepends=True)
    return "".join(line for line in lines if json.loads(line)["record"] in KEPT)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="runs whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    options = parser.parse_args(arguments)
    try:
        chosen = [run for run in RUNS if options.only in run.name]
        missing = [run for run in chosen if not is_done(run)]
        for run in chosen if options.list else ():
            print(f"{'missing' if run in missing else 'done   '}  {run.name}")
        for number, run in enumerate(() if options.list else missing, 1):
            print(f"\n{run.name} ({number} of {len(missing)})", flush=True)
            train(run)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
