"""Why corrected momentum loses: how far a batch's gradient changes in one step.

Of the uncompressed run of one worker, in the steps of STEPS: the gradient of two batches before and
after the step, by layer. `size` is the norm of the change over that of the gradient after it,
`cosine` that of the changes of the two batches, `of_gradients` that of their gradients.
"""

from collections.abc import Iterator

from torch import Tensor

from model import GPT
from scripts.probes.trainings import config_of, cosine, training_of

STEPS = (20, 50, 80)


def gradients(model: GPT, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    model.zero_grad()
    model(*batch).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def records() -> Iterator[dict]:
    """By step and layer."""
    config = config_of("identity")
    model, optimizer, (windows,) = training_of(config, count=1)
    names = [name for name, _ in model.named_parameters()]
    for step in range(1, max(STEPS) + 1):
        batches = [windows.next(config.batch.global_size) for _ in range(1 + (step in STEPS))]
        before = [gradients(model, batch) for batch in reversed(batches)][::-1]
        optimizer.step()
        if step not in STEPS:
            continue
        after = [gradients(model, batch) for batch in batches]
        for place, name in enumerate(names):
            first, other = (now[place] - was[place] for now, was in zip(after, before, strict=True))
            own = {"step": step, "layer": name, "cosine": cosine(first, other)}
            own["of_gradients"] = cosine(after[0][place], after[1][place])
            yield own | {"size": (first.norm() / after[0][place].norm()).item()}
