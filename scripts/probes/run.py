"""Measure what explains the study: `python scripts/probes/run.py [--redraw]`, some minutes.

Records go to results/probes/probes.jsonl; README.md and figures beside it are drawn from them and
from the logs of the study.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scripts.probes import differences, replay
from scripts.probes.page import draw
from scripts.studies import command

LOG = Path(__file__).resolve().parents[2] / "results" / "probes" / "probes.jsonl"
PROBES = {"differences": differences.records, "replay": replay.records}


def measure(options: argparse.Namespace) -> Iterator[dict]:
    torch.set_num_threads(1)
    for probe, records in PROBES.items():
        for record in records():
            yield {"probe": probe} | record


def main(arguments: Sequence[str] | None = None) -> int:
    return command(__doc__ or "", LOG, measure, draw, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
