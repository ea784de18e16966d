"""The largest entries of every chunk of a matrix."""

import torch
from torch import Generator, Tensor

from ef21_muon.messages.sparse import Entries, index_bytes, pack_indices, unpack_indices
from ef21_muon.messages.values import Values, pack, packed_bytes, unpack


class ChunkPlaces:
    """m x n matrices as chunks, and places of k entries in each of them as bytes.

    Their sides are the largest divisors of m and n up to `chunk`, as in the code of DeMo and
    SparseLoCo. Of a smaller chunk than k all is kept. Places are indices of fixed width in their
    chunk or Elias-Fano coded, chunk after chunk, whichever is shorter for this shape.
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

    Of smaller chunks it is max(1, round(k size / chunk^2)). The values are one row, so that a
    matrix has one scale of theirs. alpha = (1 - omega) k / size.
    """

    def __init__(self, k: int = 64, chunk: int = 64, values: Values | str = "float32"):
        super().__init__(values)
        if not (type(chunk) is int and chunk > 0):
            raise ValueError(f"ChunkTopK got chunk={chunk}: give a whole number above 0")
        if not (type(k) is int and 0 < k <= chunk**2):
            raise ValueError(f"ChunkTopK got k={k}: give a whole number above 0, at most chunk^2")
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
