"""What a step between rounds costs beside the inner optimizer's own: scripts/local_steps/cost.py.

Two copies of the model take turns, one stepped by the inner optimizer, one by local steps around
another of its kind, with the same gradients; the medians of many steps on one thread are compared.
"""

import sys
import time
from pathlib import Path
from statistics import median

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ef21_muon import ALONE, EF21Muon, LocalSteps, param_groups
from ef21_muon.compressors import Quantize
from model import GPT
from scripts.measuring import processor
from training.config import build, compose
from training.report import table

STEPS = 120
INNER = {
    "AdamW": lambda groups: torch.optim.AdamW([p for g in groups for _, p in g["params"]]),
    "EF21Muon (Scion)": lambda groups: EF21Muon(groups, process_group=ALONE),
}
SIZES = {"tiny": (), "9.7 M": ("model.width=448", "model.heads=4")}


def parameters(overrides: tuple[str, ...]) -> list[dict]:
    model = GPT(build(compose(overrides).config.model, "model"), 0)
    return param_groups(model, "scion", roles={"blocks.*": "hidden"})


def seconds_of_steps(optimizers: list[torch.optim.Optimizer]) -> list[float]:
    """The median seconds of a step of each."""
    generator, times = torch.Generator(), [[] for _ in optimizers]
    for step in range(STEPS):
        for optimizer, own in zip(optimizers, times, strict=True):
            generator.manual_seed(step)
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.randn(p.shape, generator=generator)
            start = time.perf_counter()
            optimizer.step()
            own.append(time.perf_counter() - start)
    return [median(own) for own in times]


def main() -> None:
    torch.set_num_threads(1)
    rows = [["model", "inner", "ms per step alone", "in local steps", "ratio"]]
    for size, overrides in SIZES.items():
        for name, make in INNER.items():
            alone, inner = (make(parameters(overrides)) for _ in range(2))
            local = LocalSteps(inner, STEPS + 1, w2s=Quantize("normal2"))
            one, other = seconds_of_steps([alone, local])
            cells = [f"{1e3 * one:.2f}", f"{1e3 * other:.2f}", f"{other / one:.3f}"]
            rows.append([size, name, *cells])
    print(f"{processor()}, one thread, median of {STEPS} steps between rounds\n\n{table(rows)}")


if __name__ == "__main__":
    main()
