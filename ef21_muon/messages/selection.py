"""Exact selection of the entries of largest magnitude, without sorting and in little memory."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ef21_muon.messages.pieces import at_a_time

LOW_BITS = 16  # of the 31 bits of a float32's magnitude
LOW = (1 << LOW_BITS) - 1
MAGNITUDE = 0x7FFFFFFF
SORTED_BELOW = 1 << LOW_BITS


def largest(x: Tensor, k: int) -> Tensor:
    """The positions of the k entries of largest magnitude of every row, in increasing order.

    x: float32 (L, n), 1 <= k <= n; returns int64 (L, k). Of equal magnitudes the first are taken.
    Floats of one sign are ordered as their bits, which tell the k-th entry exactly. Beside the
    result it takes about a byte an entry, on a GPU four, and 12 for each of the k. Rows that are
    shorter than a histogram are sorted. Does not wait for the device.
    """
    if x.shape[1] < SORTED_BELOW:
        order = x.abs().sort(dim=1, descending=True, stable=True).indices
        return order[:, :k].sort(1).values
    bits = x.contiguous().view(torch.int32)
    pieces = bits.split(max(1, at_a_time(x.device) // max(1, len(bits))), 1)
    kth, missing = kth_by_topk(bits, k) if x.is_cuda else kth_by_histograms(pieces, k)
    chosen = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for piece, chosen_piece in zip(pieces, chosen.split(pieces[0].shape[1], 1), strict=True):
        magnitude = piece & MAGNITUDE
        equal = magnitude == kth
        place = _places_in_rows(equal)
        chosen_piece.copy_((magnitude > kth).logical_or_(equal.logical_and_(place <= missing)))
        missing = missing - place[:, -1:]
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return chosen.flatten().nonzero_static(size=len(x) * k).view(-1, k).sub_(rows)


def _places_in_rows(marked: Tensor) -> Tensor:
    """(L, n) bool -> int32, the how manieth of its row each marked entry is, counted from 1."""
    # A GPU adds up one long row much faster than rows of a matrix.
    places = marked.flatten().cumsum(0, dtype=torch.int32).view(marked.shape)
    return places - (places[:, :1] - marked[:, :1].to(torch.int32))


def kth_by_topk(bits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest magnitude of every row, and how many equal to it are among the k.

    bits: int32 (L, n); both results: (L, 1). torch's selection on a GPU is of one pass.
    """
    magnitudes = bits & MAGNITUDE
    kth = magnitudes.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return kth, k - (magnitudes > kth).sum(1, keepdim=True)


def kth_by_histograms(pieces: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The same of parts (L, any of n): of two histograms, of high bits and then of low bits.

    The latter where the high ones are those of the k-th entry.
    """
    rows, device = len(pieces[0]), pieces[0].device
    missing = torch.full((rows, 1), k, device=device)
    counts = _histogram(((_high_bits(piece), None) for piece in pieces), rows, device)
    high, missing = _bin_of_kth(counts, missing)
    masked = ((piece & LOW, _high_bits(piece) == high) for piece in pieces)
    low, missing = _bin_of_kth(_histogram(masked, rows, device), missing)
    return high << LOW_BITS | low, missing


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
