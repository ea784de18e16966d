"""Time the LMOs of all norms.

    python scripts/lmo/run.py [--out DIR] [--seconds 20]

One thread, in seconds of processor time, so that other programs disturb little; what a column
compares is measured in turns. Prints README.md of DIR, which it writes.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon.norms import L1, BiasRMS, ColumnNorm, Euclidean, Nuclear, RowNorm, Sign, Spectral
from scripts.measuring import processor
from scripts.studies import fill, markdown
from training.config import ROOT

TEXT = Path(__file__).with_name("report.md")
NORMS = (
    *(Spectral(), Spectral("polar_express"), Spectral(dtype=torch.bfloat16), Spectral("svd")),
    *(Nuclear(), Sign(), ColumnNorm(), RowNorm(), Euclidean(), BiasRMS(), L1()),
)
SHAPES = ((128, 512), (768, 768), (768, 3072))


def table(least: float) -> str:
    """The least processor time of every LMO, over turns that take `least` seconds or more."""
    columns = [["norm", *(f"`{norm!r}`" for norm in NORMS)]]
    for m, n in SHAPES:
        x, best = torch.randn(m, n), [float("inf")] * len(NORMS)
        end = time.perf_counter() + least
        while time.perf_counter() < end:
            for place, norm in enumerate(NORMS):
                start = time.process_time()
                norm.lmo(x)
                best[place] = min(best[place], time.process_time() - start)
        cells = [f"{1e3 * one:.2f} ms, {one / best[0]:.2f}" for one in best]
        columns.append([f"{m} x {n}", *cells])
    return markdown(list(zip(*columns, strict=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "lmo")
    parser.add_argument("--seconds", type=float, default=20, help="of turns for every column")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = {"processor": processor(), "torch": torch.__version__}
    values |= {"seconds": f"{options.seconds:g}", "times": table(options.seconds)}
    page = fill(TEXT.read_text(), values)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "README.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
