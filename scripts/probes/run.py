"""Measure what explains the study: `python scripts/probes/run.py [--only PROBE ...] [--redraw]`.

The probes changes, differences, replay and sign_replay take half a minute to some minutes each.
Their records go to results/probes. The page and the figures there are drawn from these, from
network.jsonl, which network.py beside this file measures, and from the logs of the study.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scripts.probes import changes, differences, replay, sign_replay
from scripts.probes.page import PROBES, draw
from scripts.studies import write_records

MEASURED = {
    "changes": changes.records,
    "differences": differences.records,
    "replay": replay.records,
    "sign_replay": sign_replay.records,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=MEASURED, default=list(MEASURED), metavar="PROBE"
    )
    parser.add_argument("--redraw", action="store_true", help="from the records alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        for name in () if options.redraw else options.only:
            write_records(PROBES / f"{name}.jsonl", MEASURED[name]())
        for path in draw(PROBES):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
