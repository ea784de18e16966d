"""Run EF21-Muon on problems with known constants and draw it beside the bounds of its theorems.

    python scripts/theory/run.py [--out DIR] [--redraw]

Three studies (`scripts.theory.studies`): the two convergence theorems, the feedback variants, and
Muon on a convex Lipschitz function. The records go to theory.jsonl in DIR, and from them come
README.md and the pictures bounds, feedback and lipschitz as png and svg. Two processes at a time
for most of it, four minutes of processor time.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.theory.algorithm import on_workers
from scripts.theory.figures import bounds_table, draw, feedback_table, valley_table
from scripts.theory.studies import (
    CASES,
    VALLEY_RUNS,
    WORKERS,
    feedback_records,
    simulated,
    trained,
    valley_record,
)
from training.config import ROOT


def all_records() -> Iterator[dict]:
    """Run the three studies."""
    torch.set_num_threads(1)
    yield {"record": "run", "schema": 1, "torch": torch.__version__}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        for records in pool.map(simulated, CASES):
            yield from records
        yield from pool.map(valley_record, VALLEY_RUNS)
    yield from on_workers(WORKERS, trained)
    yield from feedback_records()


def read(log_file: Path) -> list[dict]:
    """The records of a theory.jsonl."""
    return [json.loads(line) for line in log_file.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "theory")
    parser.add_argument("--redraw", action="store_true", help="from DIR/theory.jsonl, no runs")
    options = parser.parse_args(arguments)
    log_file = options.out / "theory.jsonl"
    try:
        if not options.redraw:
            options.out.mkdir(parents=True, exist_ok=True)
            with log_file.open("w") as file:
                for record in all_records():
                    file.write(json.dumps(record) + "\n")
                    file.flush()
        records = read(log_file)
        draw(records, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(bounds_table(records), feedback_table(records), valley_table(records), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
