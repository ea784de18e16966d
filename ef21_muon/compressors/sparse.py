"""Compressors that keep some entries, the choice of the largest, and indices as bytes."""

from collections.abc import Sequence
from functools import cache
from itertools import count
from math import gcd

import torch
from torch import Generator, Tensor

from ef21_muon.compressors.base import Compressor
from ef21_muon.values.base import (
    AT_A_TIME,
    ValueFormat,
    check,
    check_length,
    check_share,
    pack,
    packed_bytes,
    reinterpret,
    unpack,
    wrong_length,
)

LOW_BITS = 16  # of the 31 bits of a float32's magnitude
MAGNITUDE = 0x7FFFFFFF
SORTED_BELOW = 1 << LOW_BITS


class Fraction(Compressor):
    """A compressor that keeps a fraction, in (0, 1], of what there is."""

    kind: str

    def __init__(self, fraction: float, values: ValueFormat | str = "float32"):
        super().__init__(values)
        check_share(f"{type(self).__name__} got fraction", fraction)
        self.fraction = float(fraction)

    def kept(self, total: int) -> int:
        """How many of `total` are kept: the nearest whole number, at least one."""
        return max(1, round(self.fraction * total))

    def percent(self) -> str:
        """The fraction, for the title."""
        return f"{100 * self.fraction:.4g}%"

    def title(self) -> str:
        return f"{self.kind} {self.percent()}"


class Entries(Compressor):
    """A compressor that keeps entries; a message holds their places and then their values.

    `_layout` has the bytes of the places, and the rows and columns of the values; `_positions`, of
    places uint8 (L, bytes), where in the flat matrix values are, all different: int64 (L, k).
    """

    def payload_bytes(self, m: int, n: int) -> int:
        places, rows, columns = self._layout(m, n)
        return places + self.values.payload_bytes(rows, columns)

    def alpha(self, m: int, n: int) -> float:
        _, rows, columns = self._layout(m, n)
        return (1 - self.values.omega(rows, columns)) * rows * columns / (m * n)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        split, rows, columns = self._layout(m, n)
        expected = split + self.values.payload_bytes(rows, columns)
        check_length(payload, expected, self, m, n)
        values = self.values.decode(payload[:, split:], rows, columns).flatten(1)
        x = torch.zeros(len(payload), m * n, dtype=torch.float32, device=payload.device)
        return x.scatter_(1, self._positions(payload[:, :split], m, n), values).view(-1, m, n)

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor:
        positions = self._positions(payload[:, : self._layout(m, n)[0]], m, n)
        marks = torch.zeros(len(payload), m * n, dtype=torch.bool, device=payload.device)
        return marks.scatter_(1, positions, True).view(-1, m, n)


class TopK(Fraction, Entries):
    """The k = fraction m n entries of largest magnitude; alpha = (1 - omega) k / (m n)."""

    kind = "top"
    spec = ("topk", "fraction", "values")

    def _layout(self, m: int, n: int) -> tuple[int, int, int]:
        k = self.kept(m * n)
        return index_bytes(m * n, k), 1, k

    def _positions(self, places: Tensor, m: int, n: int) -> Tensor:
        return unpack_indices(places, m * n, self.kept(m * n))

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x.flatten(1)
        indices = largest(x, self.kept(x.shape[1]))
        values = self.values.encode(x.gather(1, indices)[:, None], generator)
        return torch.cat([pack_indices(indices, x.shape[1]), values], 1)


class RandK(Fraction, Entries):
    """k = fraction m n entries at random positions, from a seed of 9 bytes.

    They are start + i stride modulo m n for i < k: a uniform start, and a stride, coprime to m n,
    out of 256. So every entry is kept with probability k / (m n): alpha = (1 - omega) k / (m n).
    """

    kind = "random"
    spec = ("randk", "fraction", "values")

    def _layout(self, m: int, n: int) -> tuple[int, int, int]:
        return 9, 1, self.kept(m * n)

    def _positions(self, places: Tensor, m: int, n: int) -> Tensor:
        stride, start = places[:, :1].to(torch.int64), reinterpret(places[:, 1:], torch.int64)
        return self._walk(start, stride, m * n)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        x = x.flatten(1)
        options = {"generator": generator, "device": x.device}
        start = torch.randint(x.shape[1], (len(x), 1), **options)
        stride = torch.randint(256, (len(x), 1), **options)
        values = x.gather(1, self._walk(start, stride, x.shape[1]))[:, None]
        seed = [stride.to(torch.uint8), start.view(torch.uint8)]
        return torch.cat([*seed, self.values.encode(values, generator)], 1)

    def _walk(self, start: Tensor, stride: Tensor, total: int) -> Tensor:
        steps = torch.arange(self.kept(total), device=start.device)
        return (start + _coprimes(total, start.device)[stride] * steps) % total


class ChunkPlaces:
    """m x n matrices as chunks, and places of k entries (or all) of each of them as bytes.

    Sides are the largest divisors of m and n up to `chunk`, as in the code of DeMo and SparseLoCo.
    Places are indices of fixed width in their chunk or Elias-Fano coded, chunk after chunk,
    whichever is shorter for this shape.
    """

    def __init__(self, m: int, n: int, chunk: int, k: int):
        self.m, self.n = m, n
        self.sides = largest_divisor(m, chunk), largest_divisor(n, chunk)
        self.grid = m // self.sides[0], n // self.sides[1]
        self.size = self.sides[0] * self.sides[1]
        self.count = m * n // self.size
        self.k = min(k, self.size)
        self.width = (self.size - 1).bit_length()
        fixed = packed_bytes(self.count * self.k, self.width)
        coded = index_bytes(m * n, self.count * self.k)
        self.fixed_width = fixed <= coded
        self.index_bytes = min(fixed, coded)

    def largest(self, chunks: Tensor) -> Tensor:
        """The k of largest magnitude of each: (L, count, size) -> places (L, count, k), rising."""
        return chunks.abs().topk(self.k, dim=2, sorted=False).indices.sort(2).values

    def pack_places(self, places: Tensor) -> Tensor:
        """(L, count, k) -> uint8 (L, index_bytes)."""
        if self.fixed_width:
            return pack(places.flatten(1), self.width)
        return pack_indices(self._chunk_after_chunk(places), self.m * self.n)

    def unpack_positions(self, indices: Tensor) -> Tensor:
        """uint8 (L, index_bytes) -> positions, counted chunk after chunk: (L, count k)."""
        kept = self.count * self.k
        if not self.fixed_width:
            return unpack_indices(indices, self.m * self.n, kept)
        places = unpack(indices, kept, self.width).to(torch.int64)
        return self._chunk_after_chunk(places.view(-1, self.count, self.k))

    def in_matrix(self, positions: Tensor) -> Tensor:
        """Positions chunk after chunk as those row after row."""
        chunk, place = positions // self.size, positions % self.size
        tall, wide = self.sides
        rows = chunk // self.grid[1] * tall + place // wide
        return rows * self.n + chunk % self.grid[1] * wide + place % wide

    def _chunk_after_chunk(self, places: Tensor) -> Tensor:
        """Places in chunks, (L, count, k), as positions (L, count k)."""
        starts = torch.arange(0, self.m * self.n, self.size, device=places.device)
        return (places + starts[:, None]).flatten(1)


class ChunkTopK(Entries):
    """The k entries of largest magnitude of every chunk of `chunk` x `chunk` (arXiv:2508.15706).

    Of smaller chunks it is max(1, round(k size / chunk^2)). The values are one row, so they have
    one scale. alpha = (1 - omega) k / size.
    """

    spec = ("chunk_topk", "k", "chunk", "values")

    def __init__(self, k: int = 64, chunk: int = 64, values: ValueFormat | str = "float32"):
        super().__init__(values)
        whole = type(chunk) is int and chunk > 0
        check(whole, f"ChunkTopK got chunk={chunk}", "a whole number above 0")
        whole = type(k) is int and 0 < k <= chunk**2
        check(whole, f"ChunkTopK got k={k}", "a whole number above 0, at most chunk^2")
        self.k, self.chunk = k, chunk

    def title(self) -> str:
        return f"top {self.k} of {self.chunk}x{self.chunk}"

    def _places(self, m: int, n: int) -> ChunkPlaces:
        size = largest_divisor(m, self.chunk) * largest_divisor(n, self.chunk)
        return ChunkPlaces(m, n, self.chunk, max(1, round(self.k * size / self.chunk**2)))

    def _layout(self, m: int, n: int) -> tuple[int, int, int]:
        chunks = self._places(m, n)
        return chunks.index_bytes, 1, chunks.count * chunks.k

    def _positions(self, places: Tensor, m: int, n: int) -> Tensor:
        chunks = self._places(m, n)
        return chunks.in_matrix(chunks.unpack_positions(places))

    def alpha(self, m: int, n: int) -> float:
        chunks = self._places(m, n)
        return (1 - self.values.omega(1, chunks.count * chunks.k)) * chunks.k / chunks.size

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        chunks = self._places(*x.shape[1:])
        (down, across), (tall, wide) = chunks.grid, chunks.sides
        tiles = x.reshape(len(x), down, tall, across, wide).transpose(2, 3)
        tiles = tiles.reshape(len(x), chunks.count, chunks.size)
        places = chunks.largest(tiles)
        values = tiles.gather(2, places).view(len(x), 1, -1)
        return torch.cat([chunks.pack_places(places), self.values.encode(values, generator)], 1)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


@cache
def _coprimes(total: int, device: torch.device) -> Tensor:
    """256 numbers coprime to `total`, spread over its range; repeated where it has fewer."""
    starts = (max(1, total * place // 256) for place in range(256))
    found = [next(n for n in count(start) if gcd(n, total) == 1) for start in starts]
    return torch.tensor(found, device=device)


def largest(x: Tensor, k: int) -> Tensor:
    """Of float32 (L, n) the positions of the k entries of largest magnitude per row: int64 (L, k).

    They rise; of equal magnitudes the first are taken. Floats of one sign are ordered as their
    bits. Takes about a byte per entry (on a GPU four) and 12 for each of the k; does not wait.
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
        # Of its row; a GPU adds up one long row much faster than rows of a matrix.
        place = equal.flatten().cumsum(0, dtype=torch.int32).view(equal.shape)
        place = place - (place[:, :1] - equal[:, :1].to(torch.int32))
        chosen_piece.copy_((magnitude > kth).logical_or_(equal.logical_and_(place <= missing)))
        missing = missing - place[:, -1:]
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return chosen.flatten().nonzero_static(size=len(x) * k).view(-1, k).sub_(rows)


# A CPU's topk takes up to three times as long as histograms, a GPU's is of one pass.


def kth_by_topk(bits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of int32 (L, n) the k-th largest magnitudes, and how many like it are among the k: (L, 1)."""
    magnitudes = bits & MAGNITUDE
    kth = magnitudes.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return kth, k - (magnitudes > kth).sum(1, keepdim=True)


def kth_by_histograms(pieces: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The same of parts (L, any of n): of high bits, and then of low ones where they are its."""
    rows, device = len(pieces[0]), pieces[0].device
    missing, kth = torch.full((rows, 1), k, device=device), None
    for _ in range(2):
        counts = torch.zeros(rows, 1 << LOW_BITS, dtype=torch.int32, device=device)
        for piece in pieces:
            high = (piece & MAGNITUDE) >> LOW_BITS
            numbers = high if kth is None else piece & (1 << LOW_BITS) - 1
            counted = torch.ones_like(high) if kth is None else (high == kth).to(torch.int32)
            counts.scatter_add_(1, numbers.to(torch.int64), counted)
        at_least = counts.flip(1).cumsum(1).flip(1)
        found = (at_least >= missing).sum(1, keepdim=True) - 1
        missing = missing - at_least.gather(1, found) + counts.gather(1, found)
        found = found.to(torch.int32)
        kth = found if kth is None else kth << LOW_BITS | found
    return kth, missing


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
