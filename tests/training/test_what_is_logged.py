"""What a log says of a training is what a plain loop of one process says, on 1, 2 and 3 workers.

The loop has its own code for what workers read, what a batch's gradient is and what is logged: it
takes whole batches, of all workers at once, and steps of float64 with exact polar factors. Radii
follow the gradients' dual norms, so that a gradient of another length takes other steps.
"""

import json

import numpy as np
import pytest
import torch
from run import launch
from workers.resume import run_alone

from model import GPT, GPTConfig

STEPS, SEQUENCES, CONTEXT, TEST_TOKENS = 5, 12, 32, 32 * 11
LR, BETA, L0, COOLDOWN = 0.5, 0.3, 5.0, 0.4
SETTINGS = [
    *("model.layers=2", "norm=gluon", "compressor@w2s=identity", "+norm.hidden.norm.method=svd"),
    *(f"norm.{role}.radius.l0={L0}" for role in ("hidden", "embedding")),
    *("norm.embedding.radius.l1=1", f"optimizer.lr={LR}", f"optimizer.momentum={1 - BETA}"),
    *(f"steps={STEPS}", f"batch.global_size={SEQUENCES}", "batch.micro_size=2"),
    *(f"eval.tokens={TEST_TOKENS}", "eval.every=2", "log_every=2", "checkpoint.every=0"),
]


def windows(tokens, starts):
    """Inputs and targets."""
    chosen = np.stack([tokens[start : start + CONTEXT + 1] for start in starts]).astype(np.int64)
    return torch.from_numpy(chosen[:, :-1]), torch.from_numpy(chosen[:, 1:])


def loss_on_test_windows(model, tokens):
    """Of windows in equal distances over the whole test set, one after the other."""
    count = TEST_TOKENS // CONTEXT
    distance = (len(tokens) - 1) // count
    with torch.no_grad():
        losses = [model(*windows(tokens, [distance * i])).item() for i in range(count)]
    return sum(losses) / count


def step_of(gradient, is_head):
    """lr d / (l0 + d) of the extreme point of the unit ball, for the dual norm d of the gradient.

    The spectral norm over sqrt(d_out / d_in); for the head the largest entry times d_in.
    """
    d_out, d_in = gradient.shape
    if is_head:
        direction, dual = gradient.sign() / d_in, gradient.abs().sum() / d_in
    else:
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        scale = (d_out / d_in) ** 0.5
        direction, dual = scale * u @ v, scale * s.sum()
    return direction * dual / (L0 + dual)


def plain_loop(train, test, workers, seed):
    """Losses of every step on the batches of all workers, and test losses after even ones."""
    model = GPT(GPTConfig(2, 32, 2, CONTEXT, 256), seed)
    part = len(train) // workers
    draw = [np.random.default_rng(np.random.SeedSequence([seed, j])) for j in range(workers)]
    momenta, losses, test_losses = {}, [], {}
    for step in range(STEPS):
        starts = [
            start
            for j in range(workers)
            for start in draw[j].integers(
                j * part, (j + 1) * part - CONTEXT, size=SEQUENCES // workers
            )
        ]
        loss = model(*windows(train, starts))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        lr = LR * min(1.0, (STEPS - step) / (COOLDOWN * STEPS))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                before = momenta.get(parameter, gradient.double())
                momenta[parameter] = before.lerp(gradient.double(), BETA)
                is_head = parameter is model.embedding.weight
                parameter -= lr * step_of(momenta[parameter], is_head)
        if (step + 1) % 2 == 0 or step + 1 == STEPS:
            test_losses[step + 1] = loss_on_test_windows(model, test)
    return losses, test_losses


@pytest.mark.parametrize(("workers", "method"), [(1, "ef21_muon"), (2, "ef21_muon"), (3, "muon")])
def test_the_log_is_that_of_a_plain_loop(small, tmp_path, workers, method):
    """Muon takes the same steps on gradients that DistributedDataParallel averages."""
    seed = 10 + workers
    own = (f"optimizer={method}", *SETTINGS, f"seed={seed}", f"directory={tmp_path}/run")
    if workers == 1:
        run_alone(tmp_path / "run", *small, *own)
    else:
        launch(workers, *small, *own)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    data = dict(one.split("=", 1) for one in small if one.startswith("data."))
    train, test = (np.fromfile(data[f"data.{part}"], np.uint16)[512:] for part in ("train", "test"))
    losses, test_losses = plain_loop(train, test, workers, seed)
    told = {r["step"]: r["loss"] for r in records if r["record"] == "train"}
    means = {2: sum(losses[0:2]) / 2, 4: sum(losses[2:4]) / 2, 5: losses[4]}
    assert told == pytest.approx(means, rel=5e-4)
    told = {r["step"]: r["test_loss"] for r in records if r["record"] == "eval"}
    assert told == pytest.approx(test_losses, rel=5e-4)
    assert records[-1]["test_loss"] == told[STEPS]
    assert abs(losses[0] - losses[4]) > 0.1, "the model has learnt, so that later losses tell"
