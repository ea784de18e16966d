"""How much of a tensor is processed at a time."""

import torch

CHUNK = 1 << 20  # entries, so that temporaries stay small
GPU_CHUNK = 1 << 24  # so that its work takes longer than the launches


def at_a_time(device: torch.device) -> int:
    """Entries of a tensor of this device."""
    return GPU_CHUNK if device.type == "cuda" else CHUNK
