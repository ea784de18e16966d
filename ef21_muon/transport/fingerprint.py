"""Short numbers that tell large tensors apart."""

from functools import cache

import torch
from torch import Tensor

CHUNK = 1 << 20
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> Tensor:
    """A scalar int64 that depends on every bit of `tensor` and on its place, modulo 2^64.

    Entries as integers are weighted by fixed odd numbers, so one that changes changes the sum; the
    sums of chunks are combined as a polynomial. Does not wait for the device.
    """
    bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
    weights = _weights(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(CHUNK):
        total = total * 6364136223846793005 + (chunk * weights[: len(chunk)]).sum()
    return total


def projection(matrices: Tensor) -> Tensor:
    """The inner product of every matrix of a batch (L, m, n) with one of random signs, (L,).

    In float64. Of a matrix of independent errors it has about the size of their Frobenius norm.
    """
    rows = matrices.flatten(1)
    signs = _weights(matrices.device)[: rows.shape[1]].sign().double()
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for chunk in rows.split(CHUNK, 1):
        total += chunk.double() @ signs[: chunk.shape[1]]
    return total


@cache
def _weights(device: torch.device) -> Tensor:
    """CHUNK odd int64 numbers, the same in every process: a GPU would draw others than a CPU."""
    generator = torch.Generator("cpu").manual_seed(0)
    limits = torch.iinfo(torch.int64)
    weights = torch.randint(limits.min, limits.max, (CHUNK,), generator=generator, device="cpu")
    return weights.bitwise_or_(1).to(device)
