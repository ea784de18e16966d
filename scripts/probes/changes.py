"""How far a batch's gradient changes in one step: `python scripts/shakespeare/changes.py`.

Of the uncompressed run of one worker, in the steps of STEPS: the gradient of two batches before and
after the step, by layer. `size` is the norm of the change over that of the gradient after it,
`cosine` that of the changes of the two batches, `of_gradients` that of their gradients. Half a
minute; the records go to results/shakespeare/changes.jsonl.
"""

import json
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from data.loader import WorkerBatches
from model import GPT
from scripts.shakespeare.results import CHANGES_LOG, RESULTS
from scripts.shakespeare.settings import IDENTITY, TUNED
from training.config import build, compose
from training.data import open_data
from training.method import build_optimizer

STEPS = (20, 50, 80)


def gradients(model: GPT, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    model.zero_grad()
    model(*batch).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()


def records(steps: tuple[int, ...]) -> list[dict]:
    """By step and layer."""
    config = compose(("experiment=shakespeare", *IDENTITY.split(), *TUNED.split())).config
    model = GPT(build(config.model, "model"), config.seed)
    optimizer, (tokens, _) = build_optimizer(config, model), open_data(config)
    windows = WorkerBatches(tokens, config.model.context, 0, 1, config.seed)
    names = [name for name, _ in model.named_parameters()]
    found = []
    for step in range(1, max(steps) + 1):
        batches = [windows.next(config.batch.global_size) for _ in range(1 + (step in steps))]
        before = [gradients(model, batch) for batch in reversed(batches)][::-1]
        optimizer.step()
        if step not in steps:
            continue
        after = [gradients(model, batch) for batch in batches]
        for place, name in enumerate(names):
            first, other = (now[place] - was[place] for now, was in zip(after, before, strict=True))
            own = {"step": step, "layer": name, "cosine": cosine(first, other)}
            own["of_gradients"] = cosine(after[0][place], after[1][place])
            found.append(own | {"size": (first.norm() / after[0][place].norm()).item()})
    return found


def main() -> None:
    torch.set_num_threads(1)
    lines = [json.dumps(record) + "\n" for record in records(STEPS)]
    (RESULTS / CHANGES_LOG).write_text("".join(lines))


if __name__ == "__main__":
    main()
