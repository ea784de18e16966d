"""Sorted indices as bytes, by Elias-Fano coding (Elias 1974, Fano 1971).

An index is split into low bits, which are packed, and a high part h. The high parts become a
bitmap, in which index number i sets bit h + i.
"""

from functools import cache

import torch
from torch import Tensor

from ef21_muon.values.base import AT_A_TIME, pack, packed_bytes, unpack, wrong_length


@cache
def shortest(universe: int, count: int) -> tuple[int, int]:
    """Return the bytes of `count` indices below `universe`, and the best number of low bits."""
    return min(
        (packed_bytes(count, width) + packed_bytes(count + (universe - 1 >> width), 1), width)
        for width in range(33)
    )


@cache
def index_bytes(universe: int, count: int) -> int:
    """Return the bytes of `count` sorted indices below `universe`."""
    return shortest(universe, count)[0]


def pack_indices(indices: Tensor, universe: int) -> Tensor:
    """Pack strictly increasing indices into bytes.

    Args:
        indices: int64 (L, k), each row strictly increasing.
        universe: the number of possible indices; all are below it.

    Returns:
        uint8 (L, index_bytes(universe, k)).
    """
    rows, kept = indices.shape
    width = shortest(universe, kept)[1]
    bitmap = indices.new_zeros(rows, kept + (universe - 1 >> width), dtype=torch.uint8)
    low = torch.empty_like(indices, dtype=torch.int32)
    size = AT_A_TIME[indices.device.type] // 4  # a position has 8 bytes
    for first in range(0, kept, size):
        piece = indices[:, first : first + size]
        places = torch.arange(first, first + piece.shape[1], device=indices.device)
        bitmap.scatter_(1, places + (piece >> width), 1)
        low[:, first : first + size] = piece & (1 << width) - 1
    return torch.cat([pack(low, width), pack(bitmap, 1)], 1)


def unpack_indices(packed: Tensor, universe: int, count: int) -> Tensor:
    """Undo `pack_indices`.

    Args:
        packed: uint8 (L, index_bytes(universe, count)).
        universe: the number of possible indices.
        count: the number of indices in each row.

    Returns:
        int64 (L, count).

    Raises:
        ValueError: if the rows have another length.
    """
    size, width = shortest(universe, count)
    if packed.shape[1] != size:
        raise wrong_length(packed, size, f"{count} indices below {universe}")
    rows, low_bytes = len(packed), packed_bytes(count, width)
    length = count + (universe - 1 >> width)
    bitmap = unpack(packed[:, low_bytes:], length, 1)
    place = bitmap.flatten().nonzero_static(size=rows * count).view(rows, count)
    row_start = torch.arange(rows, device=packed.device)[:, None] * length
    high = place - row_start - torch.arange(count, device=packed.device)
    return (high << width) | unpack(packed[:, :low_bytes], count, width)
