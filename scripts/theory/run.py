"""Run EF21-Muon on problems with known constants and draw it beside the bounds of its theorems.

    python scripts/theory/run.py [--out DIR] [--redraw]

The records of `scripts.theory.studies` go to theory.jsonl in DIR, and from them come README.md and
its pictures. Two processes at a time for most of it, six minutes of processor time.
"""

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from pathlib import Path

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.studies import command
from scripts.theory import studies
from scripts.theory.figures import draw
from training.config import ROOT


def measure(options: object = None) -> Iterator[dict]:
    """Run all studies."""
    torch.set_num_threads(1)
    yield {"record": "run", "schema": 1, "torch": torch.__version__}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        yield from chain.from_iterable(pool.map(studies.simulated, studies.CASES))
        runs = product(studies.ORDERS, studies.MOMENTUM_HORIZONS)
        yield from pool.map(studies.momentum_record, runs)
    yield from studies.on_workers(studies.WORKERS, studies.trained)
    yield from studies.feedback_records()


def main(arguments: Sequence[str] | None = None) -> int:
    log = ROOT / "results" / "theory" / "theory.jsonl"
    return command(__doc__, log, measure, draw, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
