"""Rounds of many steps in the study's setting: `python scripts/local_steps/run.py [--redraw]`.

Trains what is missing of RUNS, one after the other with torchrun on two workers, and keeps their
logs in results/local_steps; from these, and from links.jsonl (links.py), come the tables of
README.md there, which --redraw writes anew. What was interrupted goes on from its checkpoint.
"""

import argparse
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.local_steps.links import LINKS, section
from training.config import ROOT
from training.records import BYTES_PER_PARAMETER, LOG_NAME, Log, read_log
from training.report import table

RESULTS = ROOT / "results" / "local_steps"
WORKERS = 2
TARGET = 1.4596  # of results/README.md: uncompressed, one message a step, at 75 % of its tokens
COMMON = "experiment=shakespeare optimizer=local norm.hidden.radius=2"
RUNS = {f"every{every}": f"{COMMON} optimizer.every={every}" for every in (10, 30, 60)}
HEADING = ("steps a round", "test loss at the end", "sizes sent", "sizes sent to the target")


def train(name: str) -> None:
    """Train, and keep the log. Raises CalledProcessError when the training fails."""
    directory = ROOT / "runs" / "local_steps" / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={WORKERS}", "train.py", *RUNS[name].split()]
    command += [f"directory={directory.relative_to(ROOT)}", "resume=auto"]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.copy(directory / LOG_NAME, RESULTS / f"{name}.jsonl")


def sizes_to(target: float, log: Log) -> float | None:
    """Model sizes that a worker has sent when its test loss is the target.

    Between evaluations the loss is a straight line over the bytes; None if it is not reached.
    """
    size = BYTES_PER_PARAMETER * log.run["parameters"]
    points = [(record["w2s_bytes"] / size, record["test_loss"]) for record in log.evals]
    for (sent, loss), (more, lower) in pairwise(points):
        if lower <= target < loss:
            return sent + (more - sent) * (loss - target) / (loss - lower)
    return None


def row(log: Log) -> list[str]:
    reached = sizes_to(TARGET, log)
    sent = log.end["w2s_bytes"] / (BYTES_PER_PARAMETER * log.run["parameters"])
    return [
        str(log.run["config"]["optimizer"]["every"]),
        f"{log.end['test_loss']:.4f}",
        f"{sent:.3f}",
        "not reached" if reached is None else f"{reached:.3f}",
    ]


def report() -> str:
    """README.md, from the logs that there are."""
    logs = [read_log(RESULTS / f"{name}.jsonl") for name in RUNS if is_done(name)]
    rows = [HEADING, ["---:"] * len(HEADING), *map(row, logs)]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return f"""# Local steps

`python scripts/local_steps/run.py`, two workers of one thread, 0.8 M parameters, 600 steps, every
entry of a difference in 2 bits (`normal2`) with error feedback, `outer_lr` 1 and no outer momentum;
nothing but the number of steps a round was varied, and one seed was run. Bytes are one worker's in
sizes of the model, and with two workers it receives as many. The target is that of
[results](../README.md), {TARGET}, for which one message a step takes 450 sizes uncompressed and
4.97 at best.

{chr(10).join(lines)}
{section() if LINKS.exists() else ""}"""


def is_done(name: str) -> bool:
    return (RESULTS / f"{name}.jsonl").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redraw", action="store_true", help="write the table and train nothing")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        if not (options.redraw or is_done(name)):
            train(name)
    (RESULTS / "README.md").write_text(report())
    logs = [read_log(RESULTS / f"{name}.jsonl") for name in RUNS if is_done(name)]
    print(table([list(HEADING), *map(row, logs)]))


if __name__ == "__main__":
    main()
