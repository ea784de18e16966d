"""Draw test loss against tokens and against bytes sent, one line a run.

    python scripts/figures.py RUN_OR_STUDY_DIR... [--out DIR]

A run directory holds a `metrics.jsonl`; a study directory holds run directories, at any depth. The
figure is written as test_loss.png and test_loss.svg into DIR; without --out into the directory that
was given, or into the common parent of several. The same logs always give the same files.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.picture import draw
from training.records import find_runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directories", nargs="+", metavar="RUN_OR_STUDY_DIR", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path)
    options = parser.parse_args(arguments)
    try:
        given = [directory.resolve() for directory in options.directories]
        runs = list(dict.fromkeys(run for directory in given for run in find_runs(directory)))
        for path in draw(runs, options.out or Path(os.path.commonpath(given))):
            print(path)
    except (ValueError, OSError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
