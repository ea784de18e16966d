"""Time the LMOs and the forms of the Newton-Schulz iteration, with what these lose to rounding.

    python scripts/lmo/run.py [--out DIR] [--quick]

One thread, in seconds of processor time, so that other programs disturb little; what a line
compares is measured in turns. Prints README.md of DIR, which it writes.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
from training.config import ROOT

STEPS = 5
NORMS = (
    Spectral(),
    Spectral("polar_express"),
    Spectral(dtype=torch.bfloat16),
    Spectral("svd"),
    Nuclear(),
    Sign(),
    ColumnNorm(),
    RowNorm(),
    Euclidean(),
    BiasRMS(),
    L1(),
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


def times_of_forms(least: float, largest: int) -> list[list[str]]:
    lines = []
    for shape in (shape for shape in FORM_SHAPES if prod(shape) <= largest):
        x = unit_length(torch.randn(shape))
        calls = {
            name: lambda x=x, at_a_time=at_a_time: iterate(x, polynomials("jordan"), at_a_time)
            for name, at_a_time in FORMS.items()
        }
        plain, *others = seconds(calls, least).values()
        ratios = [f"{plain / other:.2f}" for other in others]
        lines.append([" x ".join(map(str, shape)), f"{1e3 * plain:.1f} ms", *ratios])
    return lines


def errors_of_forms(shape: tuple[int, int]) -> list[list[str]]:
    lines = []
    for method in POLYNOMIALS:
        for condition, smallest in CONDITIONS.items():
            x = matrix(shape, smallest)
            exact = iterate(x.double(), polynomials(method), 0)
            results = (iterate(x, polynomials(method), at_a_time) for at_a_time in FORMS.values())
            errors = [torch.linalg.matrix_norm(result - exact, 2).item() for result in results]
            lines.append([f"{method}, {condition}", *(f"{error:.0e}" for error in errors)])
    return lines


def times_of_norms(least: float, shapes: Sequence[tuple[int, int]]) -> list[list[str]]:
    columns = []
    for shape in shapes:
        x = torch.randn(shape)
        calls = {repr(norm): lambda x=x, norm=norm: norm.lmo(x) for norm in NORMS}
        times = list(seconds(calls, least).values())
        columns.append([f"{1e3 * time:.2f} ms, {time / times[0]:.2f}" for time in times])
    names = [f"`{norm!r}`" for norm in NORMS]
    return [list(line) for line in zip(names, *columns, strict=True)]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(command: str, least: float, largest: int) -> str:
    """README.md, of turns of `least` seconds on matrices of up to `largest` entries."""
    shapes = [shape for shape in NORM_SHAPES if prod(shape) <= largest]
    m, n = shapes[-1]
    return f"""# What an LMO costs

`{command}`: one thread on {processor()}, torch {torch.__version__}, float32 where nothing
else is said. Processor time, the least of {least:g} seconds of turns for each line.

## Newton-Schulz through the Gram matrix

A step takes an m x n matrix X to F X, where F is a polynomial of the m x m matrix X X^T. Several
steps at a time keep F and X X^T and multiply X by the product of all F: fewer products with n
columns, more of m x m. Five steps of Jordan's polynomial: time, and how many times faster so many
steps at a time are.

{table(["shape", *FORMS], times_of_forms(least, largest))}

Error in float32 against float64, in the spectral norm, where the exact result has about 1, for
{m} x {n} matrices: Gaussian, or with singular values from 1 down to the one given. X X^T has their
squares, so that small ones lose digits until X X^T is computed anew.

{table(["polynomials, matrix", *FORMS], errors_of_forms(shapes[-1]))}

So `newton_schulz` takes {GRAM_STEPS} at a time where n is at least {GRAM_ASPECT} m: errors stay as
small as step by step, or nearly, and most of the time is saved. In bfloat16 all goes step by step.

## The norms

One LMO, and its time over that of `{NORMS[0]!r}`.

{table(["norm", *(f"{m} x {n}" for m, n in shapes)], times_of_norms(least, shapes))}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "lmo")
    parser.add_argument("--quick", action="store_true", help="0.1 seconds per line, small ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    command = shlex.join(["python", "scripts/lmo/run.py", *arguments])
    text = report(command, *((0.1, 2**17) if options.quick else (20, 2**26)))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
