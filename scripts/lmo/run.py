"""Time the LMOs and the forms of the Newton-Schulz iteration, with what these lose to rounding.

    python scripts/lmo/run.py [--out DIR] [--quick]

One thread, in seconds of processor time, so that other programs disturb little; what a line
compares is measured in turns. Prints README.md of DIR, which it writes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon.norms import L1, BiasRMS, ColumnNorm, Euclidean, Nuclear, RowNorm, Sign, Spectral
from ef21_muon.norms.newton_schulz import GRAM_ASPECT, GRAM_STEPS, POLYNOMIALS, iterate, unit_length
from scripts.measuring import processor
from scripts.studies import fill, markdown
from training.config import ROOT

TEXT = Path(__file__).with_name("report.md")
STEPS = 5
NORMS = (
    *(Spectral(), Spectral("polar_express"), Spectral(dtype=torch.bfloat16), Spectral("svd")),
    *(Nuclear(), Sign(), ColumnNorm(), RowNorm(), Euclidean(), BiasRMS(), L1()),
)
NORM_SHAPES = ((128, 512), (768, 768), (768, 3072))
FORMS = {"step by step": 0} | {f"{steps} at a time": steps for steps in range(2, STEPS + 1)}
FORM_SHAPES = (
    *((1, 128, 128), (1, 128, 256), (1, 128, 512), (4, 128, 512)),
    *((1, 768, 768), (1, 768, 1536), (1, 768, 3072), (12, 768, 3072), (1, 768, 50304)),
)
CONDITIONS = {"Gaussian": None, "to 1e-2": 1e-2, "to 1e-5": 1e-5}  # singular values from 1


def seconds(calls: Mapping[str, Callable[[], object]], least: float) -> dict[str, float]:
    """The least processor time of each call, over turns that take `least` seconds or more."""
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + least
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def polynomials(method: str) -> list[tuple[float, float, float]]:
    published = POLYNOMIALS[method]
    return [published[min(step, len(published) - 1)] for step in range(STEPS)]


def matrix(shape: tuple[int, int], smallest: float | None) -> Tensor:
    """A float32 matrix (1, m, n) of Frobenius norm 1; Gaussian if `smallest` is None."""
    gaussian = torch.randn(1, *shape, dtype=torch.float64)
    if smallest is not None:
        left, values, right = torch.linalg.svd(gaussian, full_matrices=False)
        values = torch.from_numpy(np.geomspace(1, smallest, values.shape[-1]))
        gaussian = left * values @ right
    return unit_length(gaussian).float()


def times_of_forms(least: float, largest: int) -> str:
    rows = [["shape", *FORMS]]
    for shape in (shape for shape in FORM_SHAPES if prod(shape) <= largest):
        arguments = unit_length(torch.randn(shape)), polynomials("jordan")
        calls = {name: partial(iterate, *arguments, steps) for name, steps in FORMS.items()}
        plain, *others = seconds(calls, least).values()
        ratios = [f"{plain / other:.2f}" for other in others]
        rows.append([" x ".join(map(str, shape)), f"{1e3 * plain:.1f} ms", *ratios])
    return markdown(rows)


def errors_of_forms(shape: tuple[int, int]) -> str:
    rows = [["polynomials, matrix", *FORMS]]
    for method in POLYNOMIALS:
        for condition, smallest in CONDITIONS.items():
            x = matrix(shape, smallest)
            exact = iterate(x.double(), polynomials(method), 0)
            results = (iterate(x, polynomials(method), at_a_time) for at_a_time in FORMS.values())
            errors = [torch.linalg.matrix_norm(result - exact, 2).item() for result in results]
            rows.append([f"{method}, {condition}", *(f"{error:.0e}" for error in errors)])
    return markdown(rows)


def times_of_norms(least: float, shapes: Sequence[tuple[int, int]]) -> str:
    columns = [["norm", *(f"`{norm!r}`" for norm in NORMS)]]
    for m, n in shapes:
        x = torch.randn(m, n)
        calls = {repr(norm): partial(norm.lmo, x) for norm in NORMS}
        times = list(seconds(calls, least).values())
        cells = [f"{1e3 * time:.2f} ms, {time / times[0]:.2f}" for time in times]
        columns.append([f"{m} x {n}", *cells])
    return markdown(list(zip(*columns, strict=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "lmo")
    parser.add_argument("--quick", action="store_true", help="0.1 seconds per line, small ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    least, largest = (0.1, 2**17) if options.quick else (20, 2**26)  # seconds, entries
    shapes = [shape for shape in NORM_SHAPES if prod(shape) <= largest]
    values = {
        **{"processor": processor(), "torch": torch.__version__, "seconds": f"{least:g}"},
        **{"together": GRAM_STEPS, "aspect": GRAM_ASPECT},
        "largest": " x ".join(map(str, shapes[-1])),
        "forms": times_of_forms(least, largest),
        "errors": errors_of_forms(shapes[-1]),
        "norms": times_of_norms(least, shapes),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    page = fill(TEXT.read_text(), values)
    (options.out / "README.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
