"""The entries of largest magnitude in every row of a matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ef21_muon.values.base import AT_A_TIME

LOW_BITS = 16  # a float32's magnitude has 31 bits
MAGNITUDE = 0x7FFFFFFF
SORTED_BELOW = 1 << LOW_BITS


def largest(x: Tensor, k: int) -> Tensor:
    """Return the rising positions of the k entries of largest magnitude in every row.

    Of equal magnitudes the first are taken. It never waits for the device, and takes about one byte
    of memory per entry (four on a GPU) and 12 for each of the k. Magnitudes are compared as the
    bits of floats without their signs, which have the same order.

    Args:
        x: float32 (L, n).
        k: the number of entries per row, 1 to n.

    Returns:
        int64 (L, k).
    """
    if x.shape[1] < SORTED_BELOW:
        order = x.abs().sort(dim=1, descending=True, stable=True).indices
        return order[:, :k].sort(1).values
    bits = x.contiguous().view(torch.int32)
    pieces = bits.split(max(1, AT_A_TIME[x.device.type] // max(1, len(bits))), 1)
    kth, missing = kth_by_topk(bits, k) if x.is_cuda else kth_by_histograms(pieces, k)
    chosen = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for piece, chosen_piece in zip(pieces, chosen.split(pieces[0].shape[1], 1), strict=True):
        magnitude = piece & MAGNITUDE
        equal = magnitude == kth
        # The place within its row. A GPU sums one long row much faster than the rows of a matrix.
        place = equal.flatten().cumsum(0, dtype=torch.int32).view(equal.shape)
        place = place - (place[:, :1] - equal[:, :1].to(torch.int32))
        chosen_piece.copy_((magnitude > kth).logical_or_(equal.logical_and_(place <= missing)))
        missing = missing - place[:, -1:]
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return chosen.flatten().nonzero_static(size=len(x) * k).view(-1, k).sub_(rows)


def kth_by_topk(bits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k-th largest magnitude of every row, and how many such entries are among the k.

    A GPU's topk takes a single pass; a CPU's takes up to three times as long as histograms.

    Args:
        bits: the bits of float32 numbers, int32 (L, n).
        k: the number of entries per row.

    Returns:
        Two tensors (L, 1).
    """
    magnitudes = bits & MAGNITUDE
    kth = magnitudes.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return kth, k - (magnitudes > kth).sum(1, keepdim=True)


def kth_by_histograms(pieces: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the same as `kth_by_topk` for rows in parts (L, any number of entries).

    One histogram counts the high bits of magnitudes, and a second one the low bits of those
    magnitudes that have the high bits of the k-th largest.
    """
    rows, device = len(pieces[0]), pieces[0].device
    missing = torch.full((rows, 1), k, device=device)
    kth = torch.zeros(rows, 1, dtype=torch.int32, device=device)  # its bits so far
    for low in (False, True):
        counts = torch.zeros(rows, 1 << LOW_BITS, dtype=torch.int32, device=device)
        for piece in pieces:
            high = (piece & MAGNITUDE) >> LOW_BITS
            numbers = piece & (1 << LOW_BITS) - 1 if low else high
            counted = (high == kth).to(torch.int32) if low else torch.ones_like(high)
            counts.scatter_add_(1, numbers.to(torch.int64), counted)
        at_least = counts.flip(1).cumsum(1).flip(1)
        found = (at_least >= missing).sum(1, keepdim=True) - 1
        missing = missing - at_least.gather(1, found) + counts.gather(1, found)
        kth = kth << LOW_BITS | found.to(torch.int32)
    return kth, missing
