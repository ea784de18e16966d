"""A layer, its training, and all that its optimizer remembers."""

import torch
from torch import nn


def layer():
    torch.manual_seed(0)
    return nn.Linear(6, 8)


def take_steps(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def tables(optimizer):
    """Of a state every parameter's tensors by table, without the names of ranks."""
    state = optimizer.state_dict()["state"]
    return {n: {key: one["rank0"] for key, one in own.items()} for n, own in state.items()}


def rest(state):
    """What a state has beside tables and groups."""
    held = [one for own in state["state"].values() for one in own.values()]
    return next(one["rank0_rest"] for one in held if "rank0_rest" in one)


def everything(optimizer):
    """All that it and its inner optimizers remember, and the options of their groups, as text."""
    nested = [optimizer, *optimizer.inner]
    state = [
        {key: t.tolist() for key, t in own.items()} for o in nested for own in o.state.values()
    ]
    return str((state, [{**group, "params": 0} for o in nested for group in o.param_groups]))
