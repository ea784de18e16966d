"""States through torch.distributed.checkpoint; of several ranks see workers/checkpoint_folders.py."""

import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import RandK, TopK

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OFFLOAD = StateDictOptions(cpu_offload=True)
FULL = StateDictOptions(full_state_dict=True)


class Model(nn.Module):
    """With two groups of parameters, a layer that gets no gradient, and running statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x).tanh())

    def split(self):
        return list(self.body.parameters()), list(self.head.parameters())


def groups(model):
    body, head = model.split()
    return [{"name": "body", "params": body}, {"name": "head", "params": head, "lr": 0.003}]


def adamw(model):
    unused = {"name": "unused", "params": list(model.unused.parameters()), "betas": (0.8, 0.9)}
    return torch.optim.AdamW([*groups(model), unused], lr=0.01)


def two_inner(model):
    body, head = model.split()
    muon = EF21Muon([{"name": "body", "params": body}], process_group=ALONE, nesterov=True)
    return [muon, torch.optim.SGD([{"name": "head", "params": head}], lr=0.1, momentum=0.9)]


MAKE = {
    "muon": lambda m: EF21Muon(groups(m), w2s=RandK(0.4), s2w="rank:0.5:natural"),
    "muon, full first": lambda m: EF21Muon(groups(m), w2s=TopK(0.3), first_message="full"),
    "buffers": lambda m: EF21Muon(groups(m), w2s=RandK(0.4), buffers=m),
    "named": lambda m: EF21Muon([(n, p) for n, p in m.named_parameters() if "unused" not in n]),
    "local muon": lambda m: LocalSteps(
        EF21Muon(groups(m), w2s=RandK(0.4), process_group=ALONE), 3, w2s=RandK(0.3)
    ),
    "local, under way": lambda m: LocalSteps(
        EF21Muon(groups(m), process_group=ALONE), 4, w2s=RandK(0.3), sync_delay=2, buffers=m
    ),
    "local adamw": lambda m: LocalSteps(adamw(m), 3, w2s=TopK(0.3), outer_momentum=0.5),
    "local, two inner": lambda m: LocalSteps(two_inner(m), 3, w2s=RandK(0.3), s2w=RandK(0.5)),
    "averaged": lambda m: AveragedGradients(
        adamw(m.requires_grad_()), w2s=RandK(0.4), missing_grad="zero"
    ),
    "averaged, lossless": lambda m: AveragedGradients(adamw(m), missing_grad="zero"),
}
STEPS = 6  # of 3 or 4 a round


def take(model, optimizer, first, last):
    for step in range(first, last):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(inputs).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


def build(name):
    torch.manual_seed(0)
    model = Model()
    return model, MAKE[name](model)


def states(model, optimizer, options=None):
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    return {"model": get_model_state_dict(model), "optim": optim}


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_folder(path):
    def through(saved, here):
        dcp.save(saved, checkpoint_id=path)
        dcp.load(here, checkpoint_id=path)
        return here

    return through


WAYS = {
    "in memory": (None, lambda path: lambda saved, here: saved),
    "file": (None, lambda path: lambda saved, here: through_file(saved)),
    "folder": (None, through_folder),
    "flat": (FLAT, lambda path: lambda saved, here: saved),
    "flat file": (FLAT, lambda path: lambda saved, here: through_file(saved)),
    "flat folder": (FLAT, through_folder),
    "offload, folder": (OFFLOAD, through_folder),
    "full": (FULL, lambda path: lambda saved, here: saved),
    "full, folder": (StateDictOptions(full_state_dict=True, cpu_offload=True), through_folder),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKE)
def test_a_training_goes_on_bit_for_bit_in_another_model_and_optimizer(name, way, tmp_path):
    options, through = WAYS[way]
    model, optimizer = build(name)
    take(model, optimizer, 0, STEPS)
    saved = states(model, optimizer, options)
    other_model, other = build(name)
    state = through(tmp_path / "folder")(saved, states(other_model, other, options))
    set_model_state_dict(other_model, state["model"])
    set_optimizer_state_dict(other_model, other, state["optim"], options=options)
    assert other.steps == STEPS and other.traffic == optimizer.traffic
    take(model, optimizer, STEPS, 2 * STEPS)
    take(other_model, other, STEPS, 2 * STEPS)
    with optimizer.global_params(), other.global_params():
        ends, others = model.state_dict(), other_model.state_dict()
        assert all(torch.equal(ends[key], others[key]) for key in ends)
    assert other.traffic == optimizer.traffic
    assert str(other.state_dict()) == str(optimizer.state_dict())
