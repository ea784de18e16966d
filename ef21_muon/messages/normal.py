"""A value format for any numbers: a rotation makes them normal, a table does the rest."""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt

import torch
from torch import Generator, Tensor

from ef21_muon.messages.scaled import Blockwise
from ef21_muon.messages.values import AT_A_TIME

BITS = range(1, 7)
LONGEST = 1 << 16  # entries to rotate together
NARROW = 32  # entries: of fewer side by side, sums are slow
CPU = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


class Normal(Blockwise):
    """`bits`-bit values of the quantiser that suits normal numbers best, of rotated blocks.

    As EDEN (Vargaftik et al., arXiv:2108.08842): a block, a row or a message, is turned by a fixed
    pseudo-random rotation, which mixes a few large values with the rest, so that most blocks look
    normal; each value takes the nearest of the 2^bits levels of Lloyd and Max; the scale is the one
    of least squares, a bfloat16. Deterministic and biased. Normal values lose 0.36, 0.12, 0.035,
    0.0095, 0.0025 and 0.0006 of their squares for 1 to 6 bits; the worst block of N values, by

        omega = 1 - (lowest level / highest level)^2 (1 - 2^-16) / N,

    next to all of them. Of float32's range, magnitudes from 1e-37 to 1e35. Raises ValueError for
    other bits and blocks.
    """

    scale_dtype = torch.bfloat16
    unbiased = False

    def __init__(self, bits: int = 4, block: str = "row"):
        if not (type(bits) is int and bits in BITS):
            raise ValueError(f"normal got bits={bits}: give {BITS[0]} to {BITS[-1]}")
        if block not in ("row", "message"):  # no part of a rotated block can be left out
            raise ValueError(f"normal got block={block}: give row or message")
        self.width = bits
        super().__init__(block)

    def __str__(self) -> str:
        return f"normal{self.width}{self._told_block()}"

    def omega(self, rows: int, columns: int) -> float:
        levels = normal_levels(self.width)
        ratio = levels[len(levels) // 2] / levels[-1]
        return 1 - ratio**2 * (1 - 2**-16) / self.blocks(rows, columns)[1]

    def _turned(self, values: Tensor, back: bool = False) -> Tensor:
        return rotate_(values if back else values.clone(), back)

    def _scale(self, values: Tensor) -> Tensor:
        """Of least squares for the levels that are nearest at the root mean square."""
        largest = values.abs().amax(2, keepdim=True)
        unit = values / largest.masked_fill(largest == 0, 1)
        rms = unit.square().mean(2, keepdim=True).sqrt_()
        levels = self._levels_of(self._nearest(unit, rms))
        fit = (unit * levels).sum(2, keepdim=True) / levels.square_().sum(2, keepdim=True)
        return (fit * largest).to(self.scale_dtype).float()

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        return self._nearest(values, scale)

    def _nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        levels = _levels(self.width, values.device)
        steps = values / scale.masked_fill(scale == 0, 1)
        halfway = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(steps, halfway, out_int32=True).to(torch.uint8)

    def _levels_of(self, codes: Tensor) -> Tensor:
        levels = _levels(self.width, codes.device)
        return levels.index_select(0, codes.flatten().int()).view(codes.shape)

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        return self._levels_of(codes).mul_(scales)


@cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels, rising, that lose least of standard normal values.

    Each is the mean of the values nearest to it (Lloyd, 1957; Max, 1960), found by going there.
    """
    half = 2 ** (bits - 1)  # the other half are their negatives
    levels = [3 * (i + 0.5) / half for i in range(half)]
    change = inf
    while change > 1e-9:
        edges = [0, *((a + b) / 2 for a, b in pairwise(levels)), inf]
        density = [exp(-edge * edge / 2) / sqrt(2 * pi) for edge in edges]
        below = [erf(edge / sqrt(2)) / 2 for edge in edges]
        means = [(density[i] - density[i + 1]) / (below[i + 1] - below[i]) for i in range(half)]
        change = max(abs(new - old) for new, old in zip(means, levels, strict=True))
        levels = means
    return (*(-level for level in reversed(levels)), *levels)


def rotate_(x: Tensor, back: bool = False) -> Tensor:
    """A fixed pseudo-random rotation of the last dimension of `x`, contiguous, in place; or `back`.

    Random signs and Hadamard transforms of its segments of 2^k, the largest power of two that fits,
    at most 65536; and then of its last 2^k entries, where segments do not cover all.
    """
    length = x.shape[-1]
    size = min(LONGEST, 1 << length.bit_length() - 1)
    covered = length // size * size
    first, second = _signs(size, x.device)
    rows = x.view(-1, length)
    parts = [(rows[:, :covered], first)]
    if covered < length:
        parts.append((rows[:, -size:], second))
    for part, signs in reversed(parts) if back else parts:
        for piece in _pieces(part, size):
            piece.copy_(_hadamard(piece).mul_(signs) if back else _hadamard(piece * signs))
    return x


def _pieces(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Views of segments (rows, segments, size), some of them at a time."""
    amount = AT_A_TIME[rows.device.type]
    for some in rows.split(max(1, amount // rows.shape[1])):
        segments = some.unflatten(1, (-1, size))
        yield from segments.split(max(1, amount // (len(some) * size)), 1)


def _hadamard(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of the last dimension, 2^k long: its own inverse.

    By sums and differences of pairs, so that every processor gets the same bits; one may add up a
    matrix product in another order than the next. That of a x b numbers is that of the rows and
    then of the columns of an a x b matrix. For rows it is transposed, so that what is added up
    lies side by side.
    """
    size = x.shape[-1]
    power = size.bit_length() - 1
    width = max(1 << (power + 1) // 2, min(size, NARROW))
    columns = x.reshape(-1, width).t().contiguous()
    columns = _sums_and_differences(columns[None])[0] * size**-0.5
    matrices = columns.t().reshape(-1, size // width, width)
    return _sums_and_differences(matrices).reshape(x.shape)


def _sums_and_differences(x: Tensor) -> Tensor:
    """The transform of the middle dimension of x (L, 2^k, n), not divided by its length."""
    shape, signs = x.shape, _plus_and_minus(x.device)
    apart = 1
    while apart < shape[1]:
        # The products are exact, whether they are rounded before the sum or not.
        pairs = x.reshape(shape[0], shape[1] // (2 * apart), 2, apart * shape[2])
        x = torch.addcmul(pairs[:, :, :1], pairs[:, :, 1:], signs)
        apart *= 2
    return x.reshape(shape)


@cache
@torch.inference_mode(False)
def _plus_and_minus(device: torch.device) -> Tensor:
    return torch.tensor([[1], [-1]], **CPU).to(device)


@cache
@torch.inference_mode(False)
def _signs(size: int, device: torch.device) -> Tensor:
    """Two rows of `size` random signs, the same on every rank."""
    generator = torch.Generator("cpu").manual_seed(size)
    ones = torch.randint(2, (2, size), generator=generator, dtype=torch.int64, device="cpu")
    return (2 * ones - 1).to(device, torch.float32)


@cache
@torch.inference_mode(False)
def _levels(bits: int, device: torch.device) -> Tensor:
    return torch.tensor(normal_levels(bits), **CPU).to(device)
