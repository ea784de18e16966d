"""Weights that all workers start from."""

import torch
import torch.distributed as dist
from torch import nn

from ef21_muon.transport.fingerprint import fingerprint
from training.workers import Workers


@torch.no_grad()
def take_first(model: nn.Module, workers: Workers) -> None:
    """Rank 0's weights for all, where another kind of processor drew others from the same seed.

    To be called on all ranks. Sends fingerprints, and those weights alone that differ.
    """
    weights = [*model.parameters()]
    every = workers.gather([fingerprint(weight).item() for weight in weights])
    for weight, *prints in zip(weights, *every, strict=True):
        if len({*prints}) > 1:
            host = weight.cpu()
            dist.broadcast(host, 0, group=workers.control)
            weight.copy_(host)
