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


def everything(optimizer):
    """All that it and its inner optimizers remember, and the options of their groups, as text."""
    nested = [optimizer, *optimizer.inner]
    state = [
        {key: t.tolist() for key, t in own.items()} for o in nested for own in o.state.values()
    ]
    return str((state, [{**group, "params": 0} for o in nested for group in o.param_groups]))
