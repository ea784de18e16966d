"""The mean of every entry over the workers that have sent it, where messages leave entries out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ef21_muon.checks import choice
from ef21_muon.exchange.layers import RoundBatch
from ef21_muon.exchange.phases import Phase
from ef21_muon.messages.feedback import FEEDBACK

MEANS = ("all", "senders")  # which workers a mean is over


def check_mean(mean: str, feedback: str) -> str:
    """The value, or ValueError for one that is not of MEANS or does not go with the feedback."""
    if choice("mean", mean, MEANS) == "senders" and FEEDBACK[feedback].accumulates:
        raise ValueError(
            f"mean={mean!r} is not allowed with feedback={feedback!r}, whose servers add up means "
            "over all workers: give feedback='ef14' or 'none', or mean='all'"
        )
    return mean


def require_marks(phases: Sequence[Phase], batches: Sequence[RoundBatch]) -> None:
    """Raise ValueError for a compressor that does not say which entries its messages have."""
    for phase in phases:
        for compressor, batch in zip(phase.w2s, batches, strict=True):
            size = compressor.payload_bytes(*batch.shape)
            try:
                compressor.sent(torch.empty(0, size, dtype=torch.uint8), *batch.shape)
            except NotImplementedError:
                raise ValueError(
                    f"mean='senders' is not allowed with w2s={compressor}, which does not say "
                    "which entries a message has: give its class the method `sent`, or mean='all'"
                ) from None


def add_mean_over_senders(batch: RoundBatch, total: Tensor, messages: Sequence[Tensor]) -> bool:
    """Add to every entry of total (layers, m, n) the mean over the messages that have it.

    messages: uint8 (layers, bytes) each. False, and nothing is added, where all have all entries.
    """
    senders, received = torch.zeros_like(total), torch.zeros_like(total)
    for message in messages:
        sent = batch.w2s.sent(message, *batch.shape)
        if sent is None:
            return False
        senders += sent
        received += batch.w2s.decode(message, *batch.shape)
    total += received.div_(senders.clamp_(min=1))
    return True
