"""Compressors that keep some of the entries of a matrix."""

from functools import cache
from itertools import count
from math import gcd

import torch
from torch import Generator, Tensor

from ef21_muon.compressors.base import Compressor
from ef21_muon.compressors.indices import index_bytes, pack_indices, unpack_indices
from ef21_muon.compressors.selection import largest
from ef21_muon.values.base import (
    ValueFormat,
    check,
    check_length,
    check_share,
    pack,
    packed_bytes,
    reinterpret,
    unpack,
)


class Fraction(Compressor):
    """The base class of compressors that keep a fraction of a matrix.

    Args:
        fraction: the part that is kept, in (0, 1].
        values: the value format of what is sent, an object of `ef21_muon.values` or its spec;
            default "float32".

    Raises:
        ValueError: if an argument is out of range.
    """

    kind: str

    def __init__(self, fraction: float, values: ValueFormat | str = "float32"):
        super().__init__(values)
        check_share(f"{type(self).__name__} got fraction", fraction)
        self.fraction = float(fraction)

    def kept(self, total: int) -> int:
        """Return how many of `total` are kept: fraction total, rounded, and at least 1."""
        return max(1, round(self.fraction * total))

    def percent(self) -> str:
        """Return the fraction in percent, as the title has it."""
        return f"{100 * self.fraction:.4g}%"

    def title(self) -> str:
        return f"{self.kind} {self.percent()}"


class Entries(Compressor):
    """The base class of compressors whose messages hold positions of entries and then their values.

    Subclasses implement `_layout(m, n)`, the bytes of the positions, and the rows and columns in
    which the values are written; and `_positions(places, m, n)`, which returns the positions in the
    flat matrix, int64 (L, k) and all different, for uint8 (L, bytes).
    """

    def _layout(self, m: int, n: int) -> tuple[int, int, int]:
        raise NotImplementedError

    def _positions(self, places: Tensor, m: int, n: int) -> Tensor:
        raise NotImplementedError

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
    """The entries of largest magnitude, k = fraction m n of an m x n matrix.

        C(x)_ij = x_ij for the k largest |x_ij| and 0 elsewhere,    alpha = (1 - omega) k / (m n)

    where omega is that of the value format. Equal magnitudes are taken in the order of their
    positions. Positions are Elias-Fano coded, with about 2 + log2(1 / fraction) bits per entry.

    Args:
        fraction: the part of the entries that is sent, in (0, 1].
        values: the value format of these entries, an object of `ef21_muon.values` or its spec, such
            as "natural" or "int4@128"; default "float32".

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> compressor = TopK(0.5)
        >>> compressor.decode(compressor.encode(torch.tensor([[[3.0, -1.0], [0.0, -2.0]]])), 2, 2)
        tensor([[[ 3.,  0.],
                 [ 0., -2.]]])

    References:
        Gruntkowska et al. (arXiv:2510.00643), Algorithm 1, C in line 4 and C_j in line 10. Elias
        (1974) and Fano (1971), for the code of positions.
    """

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
    """Entries at random positions, k = fraction m n of an m x n matrix.

        C(x)_ij = x_ij at k random positions and 0 elsewhere,    alpha = (1 - omega) k / (m n)

    where omega is that of the value format. A message holds a seed of 9 bytes in place of the
    positions, which are start + i stride modulo m n for i < k. The start is uniform, and the stride
    is one of 256 numbers coprime to m n, so every entry is kept with probability k / (m n).

    Args:
        fraction: the part of the entries that is sent, in (0, 1].
        values: the value format of these entries, an object of `ef21_muon.values` or its spec;
            default "float32".

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> RandK(0.1).payload_bytes(768, 768)  # the seed, and 58982 numbers of 4 bytes
        235937
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
        start = torch.randint(x.shape[1], (len(x), 1), generator=generator, device=x.device)
        stride = torch.randint(256, (len(x), 1), generator=generator, device=x.device)
        values = x.gather(1, self._walk(start, stride, x.shape[1]))[:, None]
        seed = [stride.to(torch.uint8), start.view(torch.uint8)]
        return torch.cat([*seed, self.values.encode(values, generator)], 1)

    def _walk(self, start: Tensor, stride: Tensor, total: int) -> Tensor:
        """Return the positions start + i stride modulo `total`, int64 (L, k)."""
        steps = torch.arange(self.kept(total), device=start.device)
        return (start + _coprimes(total, start.device)[stride] * steps) % total


class ChunkPlaces:
    """The division of m x n matrices into chunks, and the code of k positions within every chunk.

    The sides of a chunk are the largest divisors of m and n up to `chunk`, as in the code of DeMo
    and SparseLoCo. Positions are written chunk by chunk, either as indices of fixed width within
    their chunk or Elias-Fano coded, whichever takes fewer bytes for this shape.

    Args:
        m: the number of rows.
        n: the number of columns.
        chunk: the largest side of a chunk, above 0.
        k: the number of entries per chunk, above 0; all entries of smaller chunks.
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
        """Return the rising positions (L, count, k) of the k largest magnitudes per chunk.

        Args:
            chunks: the entries of the chunks, (L, count, size).
        """
        return chunks.abs().topk(self.k, dim=2, sorted=False).indices.sort(2).values

    def pack_places(self, places: Tensor) -> Tensor:
        """Return positions within chunks, (L, count, k), as uint8 (L, index_bytes)."""
        if self.fixed_width:
            return pack(places.flatten(1), self.width)
        return pack_indices(self._chunk_after_chunk(places), self.m * self.n)

    def unpack_positions(self, indices: Tensor) -> Tensor:
        """Undo `pack_places`, but count positions chunk by chunk: int64 (L, count k)."""
        kept = self.count * self.k
        if not self.fixed_width:
            return unpack_indices(indices, self.m * self.n, kept)
        places = unpack(indices, kept, self.width).to(torch.int64)
        return self._chunk_after_chunk(places.view(-1, self.count, self.k))

    def in_matrix(self, positions: Tensor) -> Tensor:
        """Return positions that are counted chunk by chunk as positions in the flat matrix."""
        chunk, place = positions // self.size, positions % self.size
        tall, wide = self.sides
        rows = chunk // self.grid[1] * tall + place // wide
        return rows * self.n + chunk % self.grid[1] * wide + place % wide

    def _chunk_after_chunk(self, places: Tensor) -> Tensor:
        """Return positions within chunks, (L, count, k), counted chunk by chunk: (L, count k)."""
        starts = torch.arange(0, self.m * self.n, self.size, device=places.device)
        return (places + starts[:, None]).flatten(1)


class ChunkTopK(Entries):
    """The k entries of largest magnitude in every chunk of `chunk` x `chunk` entries.

        alpha = (1 - omega) k / size for chunks of `size` entries

    where omega is that of the value format. The sides of a chunk are the largest divisors of m and
    n up to `chunk`; of a chunk with fewer than chunk^2 entries max(1, round(k size / chunk^2)) are
    kept. All values of a message are one row, so block="row" gives them one scale.

    Args:
        k: the number of entries per chunk, from 1 to chunk^2; default 64.
        chunk: the side of a chunk, above 0; default 64.
        values: the value format of these entries, an object of `ef21_muon.values` or its spec;
            default "float32".

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> ChunkTopK(32, 64, "statistical2").payload_bytes(768, 768)
        6356

    References:
        SparseLoCo (arXiv:2508.15706).
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
    """Return the largest divisor of `number` that is at most `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


@cache
def _coprimes(total: int, device: torch.device) -> Tensor:
    """Return 256 numbers coprime to `total` over its whole range; some repeat if it has fewer."""
    starts = (max(1, total * place // 256) for place in range(256))
    found = [next(n for n in count(start) if gcd(n, total) == 1) for start in starts]
    return torch.tensor(found, device=device)
