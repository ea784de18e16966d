"""Exact selection of the entries of largest magnitude, without sorting and in little memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK = 1 << 20  # entries at a time
LOW_BITS = 16  # of the 31 bits of a float32's magnitude
LOW = (1 << LOW_BITS) - 1
MAGNITUDE = 0x7FFFFFFF
SORTED_BELOW = 1 << LOW_BITS


def largest(x: Tensor, k: int) -> Tensor:
    """The positions of the k entries of largest magnitude of every row, in increasing order.

    x: float32 (L, n), 1 <= k <= n; returns int64 (L, k). Of equal magnitudes the first are taken.
    Floats of one sign are ordered as their bits, so two histograms, of the high bits and then of
    the low bits where the high ones are those of the k-th entry, find it exactly. Beside the result
    it takes about a byte an entry. Rows shorter than a histogram are sorted. Does not wait for the
    device.
    """
    if x.shape[1] < SORTED_BELOW:
        order = x.abs().sort(dim=1, descending=True, stable=True).indices
        return order[:, :k].sort(1).values
    bits = x.contiguous().view(torch.int32)
    pieces = bits.split(max(1, CHUNK // max(1, len(bits))), 1)
    missing = torch.full((len(bits), 1), k, device=x.device)
    counts = _histogram(((_high_bits(piece), None) for piece in pieces), len(bits), x.device)
    high, missing = _bin_of_kth(counts, missing)
    masked = ((piece & LOW, _high_bits(piece) == high) for piece in pieces)
    low, missing = _bin_of_kth(_histogram(masked, len(bits), x.device), missing)
    kth = high << LOW_BITS | low
    chosen = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for piece, chosen_piece in zip(pieces, chosen.split(pieces[0].shape[1], 1), strict=True):
        magnitude = piece & MAGNITUDE
        equal = magnitude == kth
        place = equal.cumsum(1, dtype=torch.int32)
        chosen_piece.copy_((magnitude > kth).logical_or_(equal.logical_and_(place <= missing)))
        missing = missing - place[:, -1:]
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return chosen.flatten().nonzero_static(size=len(x) * k).view(-1, k).sub_(rows)


def _high_bits(bits: Tensor) -> Tensor:
    return (bits & MAGNITUDE) >> LOW_BITS


def _histogram(pieces: Iterable[tuple[Tensor, Tensor | None]], rows: int, device) -> Tensor:
    """How often each 16-bit number occurs in a row: int32 (rows, 2^16).

    pieces: numbers (rows, n), and which of them count, or None for all.
    """
    counts = torch.zeros(rows, 1 << LOW_BITS, dtype=torch.int32, device=device)
    for numbers, counted in pieces:
        ones = torch.ones_like(numbers) if counted is None else counted.to(torch.int32)
        counts.scatter_add_(1, numbers.to(torch.int64), ones)
    return counts


def _bin_of_kth(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the k-th largest number of every row, and how many of it are among the k.

    counts: (rows, bins); k and both results: (rows, 1).
    """
    at_least = counts.flip(1).cumsum(1).flip(1)
    found = (at_least >= k).sum(1, keepdim=True) - 1
    above = at_least.gather(1, found) - counts.gather(1, found)
    return found.to(torch.int32), k - above
