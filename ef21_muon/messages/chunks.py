"""The largest entries of every chunk of a matrix."""

import torch
from torch import Generator, Tensor

from ef21_muon.messages.compressors import Compressor, marked
from ef21_muon.messages.sparse import index_bytes, pack_indices, unpack_indices
from ef21_muon.messages.values import Values, check_length, pack, packed_bytes, unpack


class ChunkPlaces:
    """m x n matrices as chunks, and places of k entries in each of them as bytes.

    Chunks have the sides `largest_divisor(m, chunk)` and `largest_divisor(n, chunk)`, as in the
    code of DeMo and SparseLoCo, and `count` of them, of `size` entries each, cover the matrix. Of a
    smaller chunk than k all is kept. Places are indices of fixed width in their chunk or
    Elias-Fano coded over the whole matrix, chunk after chunk, whichever is shorter for these sizes.
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
        return pack_indices(self._in_matrix(places), self.m * self.n)

    def unpack_positions(self, indices: Tensor) -> Tensor:
        """uint8 (L, index_bytes) -> positions in the matrix, chunk after chunk: (L, count k)."""
        kept = self.count * self.k
        if not self.fixed_width:
            return unpack_indices(indices, self.m * self.n, kept)
        places = unpack(indices, kept, self.width).to(torch.int64)
        return self._in_matrix(places.view(-1, self.count, self.k))

    def as_matrices(self, entries: Tensor) -> Tensor:
        """Entries chunk after chunk, (L, m n), each at its place: (L, m, n)."""
        tiles = entries.view(-1, *self.grid, *self.sides).transpose(2, 3)
        return tiles.reshape(-1, self.m, self.n)

    def _in_matrix(self, places: Tensor) -> Tensor:
        """Places in chunks, (L, count, k), as positions in the matrix, (L, count k)."""
        starts = torch.arange(0, self.m * self.n, self.size, device=places.device)
        return (places + starts[:, None]).flatten(1)


class ChunkTopK(Compressor):
    """The k entries of largest magnitude of every chunk of `chunk` x `chunk`, as SparseLoCo's.

    arXiv:2508.15706. Chunks are as large as divisors of the matrix's sides allow, those of a vector
    (n, 1) as long, and k goes down with their size: max(1, round(k size / chunk^2)). The values are
    one row, so that a scale of theirs is one a matrix. alpha = (1 - omega) k / size.
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

    def payload_bytes(self, m: int, n: int) -> int:
        chunks = self._places(m, n)
        return chunks.index_bytes + self.values.payload_bytes(1, chunks.count * chunks.k)

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

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), self, m, n)
        chunks = self._places(m, n)
        split = chunks.index_bytes
        values = self.values.decode(payload[:, split:], 1, chunks.count * chunks.k)[:, 0]
        flat = torch.zeros(len(payload), m * n, dtype=torch.float32, device=payload.device)
        flat.scatter_(1, chunks.unpack_positions(payload[:, :split]), values)
        return chunks.as_matrices(flat)

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor:
        chunks = self._places(m, n)
        positions = chunks.unpack_positions(payload[:, : chunks.index_bytes])
        return chunks.as_matrices(marked(positions, m * n))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
