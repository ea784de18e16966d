"""The mean of every entry over the workers that have sent it, where messages leave entries out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ef21_muon.messages.compressors import Compressor


def require_marks(compressor: Compressor, m: int, n: int) -> None:
    """Raise ValueError for a compressor that does not say which entries its messages have."""
    try:
        compressor.sent(torch.empty(0, compressor.payload_bytes(m, n), dtype=torch.uint8), m, n)
    except NotImplementedError:
        raise ValueError(
            f"mean='senders' is not allowed with w2s={compressor}, which does not say which "
            "entries a message has: give its class the method `sent`, or mean='all'"
        ) from None


def add_mean_over_senders(
    compressor: Compressor, total: Tensor, messages: Sequence[Tensor]
) -> bool:
    """Add to every entry of total (layers, m, n) the mean over the messages that have it.

    messages: uint8 (layers, bytes) each. False, and nothing is added, where all have all entries.
    """
    shape = total.shape[1:]
    senders, received = torch.zeros_like(total), torch.zeros_like(total)
    for message in messages:
        sent = compressor.sent(message, *shape)
        if sent is None:
            return False
        senders += sent
        received += compressor.decode(message, *shape)
    total += received.div_(senders.clamp_(min=1))
    return True
