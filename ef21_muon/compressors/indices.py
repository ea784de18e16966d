"""Sorted indices as bytes, by Elias-Fano coding."""

from functools import cache

import torch
from torch import Tensor

from ef21_muon.values.base import AT_A_TIME, pack, packed_bytes, unpack, wrong_length

# Elias-Fano: a sorted index is split into low bits, packed, and a high part, written in unary as a
# bitmap in which index i of high part h sets bit h + i (Elias 1974, Fano 1971).


@cache
def shortest(universe: int, count: int) -> tuple[int, int]:
    """The bytes of `count` indices below `universe`, and the number of low bits for so few."""
    return min(
        (packed_bytes(count, width) + packed_bytes(count + (universe - 1 >> width), 1), width)
        for width in range(33)
    )


@cache
def index_bytes(universe: int, count: int) -> int:
    """Bytes that `count` sorted indices below `universe` take."""
    return shortest(universe, count)[0]


def pack_indices(indices: Tensor, universe: int) -> Tensor:
    """Strictly increasing int64 (L, k) below `universe` -> uint8 (L, index_bytes(universe, k))."""
    rows, kept = indices.shape
    width = shortest(universe, kept)[1]
    bitmap = indices.new_zeros(rows, kept + (universe - 1 >> width), dtype=torch.uint8)
    low = torch.empty_like(indices, dtype=torch.int32)
    size = AT_A_TIME[indices.device.type] // 4  # since places have 8 bytes
    for first in range(0, kept, size):
        piece = indices[:, first : first + size]
        places = torch.arange(first, first + piece.shape[1], device=indices.device)
        bitmap.scatter_(1, places + (piece >> width), 1)
        low[:, first : first + size] = piece & (1 << width) - 1
    return torch.cat([pack(low, width), pack(bitmap, 1)], 1)


def unpack_indices(packed: Tensor, universe: int, count: int) -> Tensor:
    """Undo `pack_indices`: int64 (L, count); ValueError for rows of another length."""
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
