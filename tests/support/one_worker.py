"""EF21Muon with one worker: parameters of several shapes, their gradients, and copies of them."""

import torch

from ef21_muon import EF21Muon

SHAPES = {"query": (12, 20), "key": (12, 20), "kernel": (8, 3, 5), "bias": (15,), "scale": ()}


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def build(dtype=torch.float32, shapes=SHAPES, **options):
    """Parameters by name and their optimizer."""
    start = random_tensors(seed=0)
    parameters = {name: torch.nn.Parameter(start[name].to(dtype)) for name in shapes}
    return parameters, EF21Muon(parameters.items(), **options)


def set_gradients(parameters, seed):
    gradients = random_tensors(seed)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].to(parameter.dtype)


def copies(parameters):
    return [parameter.detach().clone() for parameter in parameters.values()]
