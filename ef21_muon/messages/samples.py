"""Numbers that are alike on every machine, of which torch.randn draws others on some processors."""

import torch
from torch import Generator, Tensor


def generator() -> Generator:
    """Of the CPU, in the same state each time."""
    return Generator("cpu").manual_seed(0)


def numbers(*shape: int, below: int = 1 << 23) -> Tensor:
    """Pseudo-random whole numbers from -below up to below, float32 on the CPU.

    Of few digits, as below=8, sums are exact in any order; those of 24 fill a mantissa.
    """
    return torch.randint(
        -below, below, shape, generator=generator(), dtype=torch.float32, device="cpu"
    )
