"""How small integers and sorted indices become bytes.

Every size is a function of counts alone, never of the data, so a receiver knows it in advance.
Functions work on rows, one message a row: (L, n) numbers to (L, bytes) and back. Words are packed
little-endian, as on every machine that torch runs on.
"""

from functools import cache

import torch
from torch import Tensor

from ef21_muon.messages.pieces import at_a_time


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` integers of `width` bits take: whole bytes apart, the rest bit-packed."""
    return count * (width // 8) + (count * (width % 8) + 7) // 8


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack integers in [0, 2^width), width 0 to 32.

    codes: (L, n), any integer or bool dtype; returns uint8 (L, packed_bytes(n, width)).
    """
    parts = [(codes >> 8 * plane & 0xFF).to(torch.uint8) for plane in range(width // 8)]
    if width % 8:
        parts.append(_pack_below_byte((codes >> width // 8 * 8).to(torch.uint8), width % 8))
    if not parts:
        return torch.empty(len(codes), 0, dtype=torch.uint8, device=codes.device)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def unpack(packed: Tensor, count: int, width: int) -> Tensor:
    """Undo `pack`. Returns (L, count): uint8 for widths up to 8, int64 beyond.

    Raises ValueError if `packed` does not have packed_bytes(count, width) bytes a row.
    """
    check_length(packed, packed_bytes(count, width), f"{count} integers of {width} bits")
    if width == 8:
        return packed
    if count == 0 or width == 0:
        return packed.new_zeros(len(packed), count)
    if width < 8:
        return _unpack_below_byte(packed, count, width)
    codes = torch.zeros(len(packed), count, dtype=torch.int64, device=packed.device)
    for plane in range(width // 8):
        codes |= packed[:, plane * count : (plane + 1) * count].to(torch.int64) << 8 * plane
    if width % 8:
        rest = _unpack_below_byte(packed[:, width // 8 * count :], count, width % 8)
        codes |= rest.to(torch.int64) << width // 8 * 8
    return codes


def check_length(payload: Tensor, expected: int, what: str) -> None:
    """Raise ValueError unless every row of `payload` has `expected` bytes."""
    if payload.shape[1] != expected:
        raise ValueError(
            f"a payload of {payload.shape[1]} bytes was given where {what} take {expected}: "
            "sender and receiver must use the same compressor and shape"
        )


def reinterpret(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of bytes, at any offset of a larger buffer, read as rows of numbers."""
    return payload.clone(memory_format=torch.contiguous_format).view(dtype)


def _word(width: int) -> torch.dtype:
    """The integer that holds eight codes of `width` bits."""
    return {1: torch.uint8, 2: torch.int16}.get(width, torch.int32 if width <= 4 else torch.int64)


def _pack_below_byte(codes: Tensor, width: int) -> Tensor:
    rows, count = codes.shape
    groups = (count + 7) // 8
    words = (words_at_once if codes.is_cuda else words_by_place)(codes, width)
    packed = words.view(torch.uint8).view(rows, groups, words.element_size())[..., :width]
    return packed.reshape(rows, groups * width)[:, : packed_bytes(count, width)]


def _unpack_below_byte(packed: Tensor, count: int, width: int) -> Tensor:
    rows, groups = len(packed), (count + 7) // 8
    size = _word(width).itemsize
    padded = torch.zeros(rows, groups * width, dtype=torch.uint8, device=packed.device)
    padded[:, : packed.shape[1]] = packed
    padded = torch.nn.functional.pad(padded.view(rows, groups, width), (0, size - width))
    words = padded.view(rows, groups * size).view(_word(width))
    codes = (codes_at_once if packed.is_cuda else codes_by_place)(words, width)
    return codes.view(rows, groups * 8)[:, :count]


# Eight codes a word, either place after place, in little memory, or all at once, in few launches.


def words_by_place(codes: Tensor, width: int) -> Tensor:
    """(L, n) codes -> (L, ceil(n / 8)) words."""
    rows, count = codes.shape
    words = torch.zeros(rows, (count + 7) // 8, dtype=_word(width), device=codes.device)
    for place in range(8):
        column = codes[:, place::8]
        words[:, : column.shape[1]] |= column.to(words.dtype) << width * place
    return words


def words_at_once(codes: Tensor, width: int) -> Tensor:
    """The same."""
    word = _word(width)
    eights = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    return (eights.to(word) << _shifts(width, codes.device)).sum(2, dtype=word)


def codes_by_place(words: Tensor, width: int) -> Tensor:
    """(L, n) words -> uint8 (L, n, 8) codes."""
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for place in range(8):
        codes[..., place] = (words >> width * place & (1 << width) - 1).to(torch.uint8)
    return codes


def codes_at_once(words: Tensor, width: int) -> Tensor:
    """The same."""
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    size = max(1, at_a_time(words.device) // (8 * max(1, len(words))))
    shifts = _shifts(width, words.device)
    for part, of_part in zip(words.split(size, 1), codes.split(size, 1), strict=True):
        of_part.copy_(part[..., None] >> shifts & (1 << width) - 1)
    return codes


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8 * width, width, dtype=_word(width), device=device)


# Elias-Fano: a sorted index is split into low bits, packed, and a high part, written in unary as a
# bitmap in which index i of high part h sets bit h + i (Elias 1974, Fano 1971).


@cache
def low_width(universe: int, count: int) -> int:
    """The number of low bits that makes `count` indices below `universe` shortest."""
    return min(range(33), key=lambda width: _index_bytes(universe, count, width))


def _index_bytes(universe: int, count: int, width: int) -> int:
    return packed_bytes(count, width) + packed_bytes(count + (universe - 1 >> width), 1)


def index_bytes(universe: int, count: int) -> int:
    """Bytes that `count` sorted indices below `universe` take."""
    return _index_bytes(universe, count, low_width(universe, count)) if count else 0


def pack_indices(indices: Tensor, universe: int) -> Tensor:
    """Elias-Fano code of strictly increasing rows of indices below `universe`.

    indices: (L, k) int64; returns uint8 (L, index_bytes(universe, k)).
    """
    rows, count = indices.shape
    if count == 0:
        return torch.empty(rows, 0, dtype=torch.uint8, device=indices.device)
    width = low_width(universe, count)
    bitmap = torch.zeros(
        rows, count + (universe - 1 >> width), dtype=torch.uint8, device=indices.device
    )
    low = torch.empty(rows, count, dtype=torch.int32, device=indices.device)
    size = at_a_time(indices.device) // 4  # since places have 8 bytes
    for first in range(0, count, size):
        piece = indices[:, first : first + size]
        places = torch.arange(first, first + piece.shape[1], device=indices.device)
        bitmap.scatter_(1, places + (piece >> width), 1)
        low[:, first : first + size] = piece & (1 << width) - 1
    return torch.cat([pack(low, width), pack(bitmap, 1)], 1)


def unpack_indices(packed: Tensor, universe: int, count: int) -> Tensor:
    """Undo `pack_indices`. Returns (L, count) int64.

    Raises ValueError if `packed` does not have index_bytes(universe, count) bytes a row.
    """
    check_length(packed, index_bytes(universe, count), f"{count} indices below {universe}")
    rows = len(packed)
    if count == 0:
        return torch.empty(rows, 0, dtype=torch.int64, device=packed.device)
    width = low_width(universe, count)
    low_bytes, length = packed_bytes(count, width), count + (universe - 1 >> width)
    bitmap = unpack(packed[:, low_bytes:], length, 1)
    place = bitmap.flatten().nonzero_static(size=rows * count).view(rows, count)
    row_start = torch.arange(rows, device=packed.device)[:, None] * length
    high = place - row_start - torch.arange(count, device=packed.device)
    return (high << width) | unpack(packed[:, :low_bytes], count, width)
