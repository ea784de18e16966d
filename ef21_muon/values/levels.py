"""Value formats whose values are the nearest of a table: of normal numbers, or of bins' means."""

from functools import cache
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt

import torch
from torch import Generator, Tensor

from ef21_muon.values.base import AT_A_TIME, check, pack
from ef21_muon.values.scaled import Blockwise

LONGEST = 1 << 16  # entries to rotate together
NARROW = 32  # entries: of fewer side by side, sums are slow


class Normal(Blockwise):
    """`bits`-bit values of the quantiser that suits normal numbers best, of rotated blocks.

    As EDEN (Vargaftik et al., arXiv:2108.08842): a block, a row or the whole matrix, is turned by a fixed
    pseudo-random rotation, after which most look normal; each value takes the nearest of the 2^bits
    levels of Lloyd and Max; the scale is that of least squares, a bfloat16. Deterministic, biased.
    Normal values lose 0.36, 0.12, 0.035, 0.0095, 0.0025 and 0.0006 of their squares for 1 to 6
    bits, the worst block of N values omega = 1 - (lowest level / highest level)^2 (1 - 2^-16) / N.
    Magnitudes from 1e-37 to 1e35.
    """

    name = "normal{.width}"
    scale_dtype = torch.bfloat16

    def __init__(self, bits: int = 4, block: str = "row"):
        check(type(bits) is int and 1 <= bits <= 6, f"normal got bits={bits}", "1 to 6")
        # No part of a rotated block can be left out.
        check(block in ("row", "tensor"), f"normal got block={block}", "row or tensor")
        self.width = bits
        super().__init__(block)

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
        levels = self._restore(1, self._quantise(unit, rms, None))
        fit = (unit * levels).sum(2, keepdim=True) / levels.square_().sum(2, keepdim=True)
        return (fit * largest).to(self.scale_dtype).float()

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        levels = _table(normal_levels(self.width), values.device)
        steps = values / scale.masked_fill(scale == 0, 1)
        halfway = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(steps, halfway, out_int32=True).to(torch.uint8)

    def _restore(self, scales: Tensor | int, codes: Tensor) -> Tensor:
        levels = _table(normal_levels(self.width), codes.device)
        return levels.index_select(0, codes.flatten().int()).view(codes.shape).mul_(scales)


class Statistical(Blockwise):
    """`bits`-bit bins around the mean, a value for its bin's mean: deterministic, biased.

    The quantiser of MuLoCo (arXiv:2505.23725) and SparseLoCo (arXiv:2508.15706). With B = 2^bits,
    c = x less the block's mean and sd its unbiased standard deviation,

        q = clamp(round(c / scale + B / 2), 0, B - 1),  scale = span sd / B

    (1 for an sd of 0), halves to even, and every bin becomes the mean of what is in it. A block, a
    matrix or a row, takes 4 (B + 1) bytes beside its codes: its mean, and the bins' as float32.
    The squares within bins are lost, at worst all: omega = 1. Normal values lose 0.18, 0.012 and
    0.0003 of their squares for 2, 4 and 8 bits.
    """

    name = "statistical{.width}"
    default_block = "tensor"
    scales = property(lambda self: 1 + self.bins)  # a block's mean, and means of bins less it
    error = 1.0

    def __init__(self, bits: int = 4, block: str = "tensor", span: float = 6.0):
        check(type(bits) is int and 2 <= bits <= 8, f"statistical got bits={bits}", "2 to 8")
        check(block in ("row", "tensor"), f"statistical got block={block}", "row or tensor")
        positive = isinstance(span, float | int) and 0 < span < inf
        check(positive, f"statistical got span={span}", "a number above 0")
        self.width, self.bins, self.span = bits, 2**bits, span
        super().__init__(block)

    def __str__(self) -> str:
        return super().__str__() + ("" if self.span == 6 else f":span={self.span:g}")

    __repr__ = __str__

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        blocks, length = self.blocks(*values.shape[1:])
        x = values.reshape(len(values), blocks, length)
        mean = x.mean(2, keepdim=True)
        unit = x - mean
        # A power of two below all, by which squares are in float32's range, and rounded as before.
        exponents = unit.abs().amax(2, keepdim=True).view(torch.int32) >> 23
        power = (exponents.clamp_(27, 253) << 23).view(torch.float32)
        unit /= power
        deviation = unit.var(2, keepdim=True, correction=min(1, length - 1)).sqrt_()
        scale = deviation.mul_(self.span / self.bins)
        scale.masked_fill_(scale == 0, 1)
        steps = (unit / scale).add_(self.bins // 2).round_()
        codes = steps.clamp_(0, self.bins - 1).to(torch.uint8)
        means = torch.cat([mean, self._means(unit, codes) * power], 2).flatten(1)
        return torch.cat([means.view(torch.uint8), pack(codes.flatten(1), self.width)], 1)

    def _means(self, unit: Tensor, codes: Tensor) -> Tensor:
        """Of what has a code, 0 where nothing has: (L, blocks, bins).

        Magnitudes, at most 4, are added up as integers: in any order to the same bits.
        """
        one = 2.0 ** (60 - unit.shape[2].bit_length())
        sums = torch.zeros(*unit.shape[:2], self.bins, dtype=torch.int64, device=unit.device)
        counts = torch.zeros_like(sums)
        size = max(1, AT_A_TIME[unit.device.type] // (unit.shape[0] * unit.shape[1]))
        add = add_by_bins if unit.is_cuda and self.bins <= 16 else add_by_places
        for part, of_part in zip(unit.split(size, 2), codes.split(size, 2), strict=True):
            add(sums, counts, (part * one).to(torch.int64), of_part)
        return (sums.double() / counts.clamp_min_(1)).div_(one).float()

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        return (scales[..., 1:] + scales[..., :1]).gather(2, codes.to(torch.int64))


def add_by_places(sums: Tensor, counts: Tensor, values: Tensor, codes: Tensor) -> None:
    """Add int64 (L, blocks, n) to the sums of their bins, (L, blocks, bins), and count them."""
    places = codes.to(torch.int64) & sums.shape[2] - 1  # what is not finite has any code
    sums.scatter_add_(2, places, values)
    counts.scatter_add_(2, places, torch.ones_like(places))


def add_by_bins(sums: Tensor, counts: Tensor, values: Tensor, codes: Tensor) -> None:
    """The same, bin after bin: on a GPU all threads would wait to add to the same few numbers."""
    places = codes & sums.shape[2] - 1
    for number in range(sums.shape[2]):
        chosen = places == number
        sums[..., number] += torch.where(chosen, values, 0).sum(2)
        counts[..., number] += chosen.sum(2)


@cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels that lose least of standard normal values (Lloyd; Max, 1960), rising.

    Each is the mean of the values nearest to it, found by going there.
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
    """Turn the last dimension of `x`, contiguous, in place by a fixed rotation; or `back`.

    Random signs and Hadamard transforms of segments of 2^k <= 65536, the largest power that fits,
    and then of the last 2^k entries, where segments do not cover all.
    """
    length = x.shape[-1]
    size = min(LONGEST, 1 << length.bit_length() - 1)
    covered = length // size * size
    first, second = _signs(size, x.device)
    rows = x.view(-1, length)
    parts = [(rows[:, :covered], first)]
    if covered < length:
        parts.append((rows[:, -size:], second))
    amount = AT_A_TIME[x.device.type]
    for part, signs in reversed(parts) if back else parts:
        for some in part.split(max(1, amount // part.shape[1])):
            segments = some.unflatten(1, (-1, size))
            for piece in segments.split(max(1, amount // (len(some) * size)), 1):
                piece.copy_(_hadamard(piece).mul_(signs) if back else _hadamard(piece * signs))
    return x


def _hadamard(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of the last dimension, 2^k long: its own inverse.

    By sums and differences of pairs, of which every processor gets the same bits: of a x b numbers
    the rows of an a x b matrix, transposed so that they lie side by side, and then its columns.
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
    shape, signs = x.shape, _table(((1,), (-1,)), x.device)
    apart = 1
    while apart < shape[1]:
        # The products are exact.
        pairs = x.reshape(shape[0], shape[1] // (2 * apart), 2, apart * shape[2])
        x = torch.addcmul(pairs[:, :, :1], pairs[:, :, 1:], signs)
        apart *= 2
    return x.reshape(shape)


@cache
@torch.inference_mode(False)
def _signs(size: int, device: torch.device) -> Tensor:
    """Two rows of `size` random signs, the same on every rank."""
    generator = torch.Generator("cpu").manual_seed(size)
    ones = torch.randint(2, (2, size), generator=generator, dtype=torch.int64, device="cpu")
    return (2 * ones - 1).to(device, torch.float32)


@cache
@torch.inference_mode(False)
def _table(numbers: tuple, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(device)
