"""What users do on two ranks, and what the library makes of it, as `rank<r>.json`.

Run by torchrun with a directory.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import TopK
from ef21_muon.norms import Sign, Spectral
from ef21_muon.transport import stragglers

STEPS = 6
LR = 0.01


def local(model, **options):
    return LocalSteps(EF21Muon(model.parameters(), process_group=ALONE), **options)


def averaged(model, **options):
    return AveragedGradients(torch.optim.AdamW(model.parameters(), lr=LR), **options)


# What builds an optimizer of the last rank, and of the others; what is said of it.
DIFFERENT = {
    "w2s": (lambda m: EF21Muon(m.parameters()), lambda m: EF21Muon(m.parameters(), w2s=TopK(0.2))),
    "s2w": (
        lambda m: EF21Muon(m.parameters(), server="rank0", s2w=TopK(0.3)),
        lambda m: EF21Muon(m.parameters(), server="rank0", s2w=TopK(0.2)),
    ),
    "norm": (
        lambda m: EF21Muon(m.parameters(), norm=Spectral()),
        lambda m: EF21Muon(m.parameters(), norm=Sign()),
    ),
    "lr": (lambda m: EF21Muon(m.parameters(), 0.1), lambda m: EF21Muon(m.parameters(), 0.2)),
    "lr as a tensor": (
        lambda m: EF21Muon(m.parameters(), torch.tensor(0.1)),
        lambda m: EF21Muon(m.parameters(), torch.tensor(0.2)),
    ),
    "feedback": (
        lambda m: EF21Muon(m.parameters(), feedback="ef14"),
        lambda m: EF21Muon(m.parameters(), feedback="none"),
    ),
    "server": (
        lambda m: EF21Muon(m.parameters(), server="rank0"),
        lambda m: EF21Muon(m.parameters(), server="sharded"),
    ),
    "missing_grad": (
        lambda m: EF21Muon(m.parameters(), missing_grad="zero"),
        lambda m: EF21Muon(m.parameters()),
    ),
    "momentum_init": (
        lambda m: EF21Muon(m.parameters(), momentum_init="zero"),
        lambda m: EF21Muon(m.parameters()),
    ),
    "sync_every": (lambda m: local(m, sync_every=3), lambda m: local(m, sync_every=4)),
    "outer_lr": (lambda m: local(m, outer_lr=0.7), lambda m: local(m)),
    "method": (lambda m: EF21Muon(m.parameters()), averaged),
}


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 12))


def loss_of(model, step, rank):
    tokens = torch.randint(12, (16,), generator=torch.Generator().manual_seed(10 * step + rank))
    return nn.functional.cross_entropy(model(tokens), tokens)


def parameters_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def error_of(error, do):
    try:
        do()
    except error as raised:
        return str(raised)
    return "no error"


def different(name):
    """The error where the last rank builds another optimizer."""
    one, other = DIFFERENT[name]
    return error_of(ValueError, lambda: (one if dist.get_rank() == 0 else other)(new_model()))


def mixed(rest, matrices=()):
    """A training with EF21Muon for hidden matrices and AdamW for the rest."""
    model = new_model()
    hidden = [model[1].weight]
    others = [parameter for parameter in model.parameters() if parameter is not model[1].weight]
    optimizers = [
        EF21Muon(hidden, lr=LR, norm=Spectral("svd"), **dict(matrices)),
        AveragedGradients(torch.optim.AdamW(others, lr=LR), **rest),
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in optimizers]
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        for one in (*optimizers, *schedulers):
            one.step()
    for optimizer in optimizers:
        optimizer.check_agreement()
        optimizer.check_finite()
    return parameters_of(model).tolist(), optimizers[1].w2s_bytes


def branches(missing):
    """Rank 1 takes another branch than rank 0 in odd steps: parameters, or the error."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    optimizer = EF21Muon(model.parameters(), lr=LR, norm=Spectral("svd"), missing_grad=missing)
    for step in range(4):
        optimizer.zero_grad()
        branch = dist.get_rank() if step % 2 else 0
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model[branch](x).square().mean().backward()
        optimizer.step()
    optimizer.check_agreement()
    return parameters_of(model).tolist()


def rates():
    """What checks say of a learning rate that is a tensor, and after a rank has written into it."""
    model = new_model()
    optimizer = EF21Muon(model.parameters(), torch.tensor(0.5))
    loss_of(model, 0, dist.get_rank()).backward()
    optimizer.step()
    said = [error_of(ValueError, optimizer.check_agreement)]
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["lr"].fill_(0.25)
    return [*said, error_of(ValueError, optimizer.check_agreement)]


class Messages(logging.Handler):
    """Keeps the lines, and informs the other ranks of them by a word in the store."""

    def __init__(self, word):
        super().__init__()
        self.lines, self.word = [], word
        self.store = dist.distributed_c10d._get_default_store().clone()

    def emit(self, record):
        self.lines.append(record.getMessage())
        self.store.set(self.word, "1")


def alone_in_a_step(how):
    """What rank 0 reports while rank 1 does not come to a step, until it comes after all."""
    word = f"waited {how}"
    messages = Messages(word)
    stragglers.log.addHandler(messages)
    model = new_model()
    optimizer = local(model, sync_every=2) if how == "local" else EF21Muon(model.parameters())
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        if step == 1 and dist.get_rank() == 1:
            if how == "refused":
                gradient, model[1].weight.grad = model[1].weight.grad, None
                error_of(RuntimeError, optimizer.step)
                model[1].weight.grad = gradient
            messages.store.wait([word])
        optimizer.step()
    optimizer.check_agreement()
    stragglers.log.removeHandler(messages)
    return messages.lines


def left_alone():
    """What rank 0 reports where rank 1 has ended."""
    model = new_model()
    optimizer = EF21Muon(model.parameters())
    loss_of(model, 0, dist.get_rank()).backward()
    optimizer.step()
    if dist.get_rank() == 1:
        return []
    try:
        optimizer.step()
    except RuntimeError as error:
        return error.__notes__
    return ["no error"]


def main(directory):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stragglers.REPORT_AFTER, stragglers.CHECK_EVERY = 0.5, 0.2
    report = {f"different {name}": different(name) for name in DIFFERENT}
    report["mixed"] = mixed({})
    for server in ("rank0", "sharded", "replicated"):
        report[f"mixed {server}"] = mixed({"server": server, "w2s": TopK(0.3)})
    report["mixed ef14"] = mixed({"w2s": TopK(0.3), "feedback": "ef14", "error_decay": 0.9})
    report["zero"] = branches("zero")
    report["rates"] = rates()
    for how in ("late", "refused", "local"):
        report[how] = alone_in_a_step(how)
    path = directory / f"rank{rank}.json"
    path.write_text(json.dumps(report | {"left": []}))
    report["left"] = left_alone()
    path.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
