"""Value formats with a table of levels: those of normal numbers, or the means of bins."""

from functools import cache
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt

import torch
from torch import Generator, Tensor

from ef21_muon.values.base import AT_A_TIME, check, check_block, pack
from ef21_muon.values.scaled import Blockwise

LONGEST = 1 << 16  # entries to rotate together
NARROW = 32  # entries; sums of rows are slow where fewer lie side by side


class Normal(Blockwise):
    """Rotated blocks, rounded to the best `bits`-bit levels for normal numbers, as in EDEN.

    A fixed pseudo-random rotation turns each block, after which most blocks look normal. Each value
    becomes the nearest of the 2^bits levels of Lloyd and Max, times a least-squares scale of the
    block, a bfloat16. Deterministic and biased. Normal values lose 0.36, 0.12, 0.035, 0.0095,
    0.0025 and 0.0006 of their squares for 1 to 6 bits; the worst block of N values loses

        omega = 1 - (lowest level / highest level)^2 (1 - 2^-16) / N

    with levels by magnitude. It works for magnitudes from 1e-37 to 1e35.

    Args:
        bits: the bits per value, 1 to 6; default 4.
        block: what is rotated together and shares a scale, "row" (default) or "tensor".

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> Normal(2, block="tensor").payload_bytes(64, 128)  # 2 bits per value, and 2 bytes
        2050

    References:
        Vargaftik et al., EDEN (arXiv:2108.08842). Lloyd; Max (1960), for the levels.
    """

    name = "normal{.width}"
    scale_dtype = torch.bfloat16

    def __init__(self, bits: int = 4, block: str = "row"):
        check(type(bits) is int and 1 <= bits <= 6, f"normal got bits={bits}", "1 to 6")
        # A rotated block is sent as a whole, so it cannot be padded.
        check_block(block in ("row", "tensor"), "normal", block, "row or tensor")
        self.width = bits
        super().__init__(block)

    def omega(self, rows: int, columns: int) -> float:
        levels = normal_levels(self.width)
        ratio = levels[len(levels) // 2] / levels[-1]
        return 1 - ratio**2 * (1 - 2**-16) / self.blocks(rows, columns)[1]

    def _turned(self, values: Tensor, back: bool = False) -> Tensor:
        return rotate_(values if back else values.clone(), back)

    def _scale(self, values: Tensor) -> Tensor:
        """Return the least-squares scale for the levels nearest at the root mean square."""
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
    """Equal bins around the mean, where every value becomes the mean of its bin.

    With B = 2^bits, c = x minus the block's mean, and sd its unbiased standard deviation, a code is

        q = clamp(round(c / scale + B / 2), 0, B - 1),  scale = span sd / B

    (scale 1 if sd = 0, halves to even). Beside its codes a block takes 4 (B + 1) bytes: its mean
    and the means of the bins, as float32. Deterministic and biased. The worst block loses all of
    its squares within bins, omega = 1; normal values lose 0.18, 0.012 and 0.0003 of their
    squares for 2, 4 and 8 bits.

    Args:
        bits: the bits per value, 2 to 8; default 4.
        block: what shares a table of means, "tensor" (default) or "row".
        span: the width of all bins together in standard deviations, above 0; default 6.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> Statistical(2, span=5)
        statistical2:span=5

    References:
        The quantiser of MuLoCo (arXiv:2505.23725) and SparseLoCo (arXiv:2508.15706).
    """

    name = "statistical{.width}"
    default_block = "tensor"
    # The mean of a block, and the means of its bins minus that mean.
    scales = property(lambda self: 1 + self.bins)
    error = 1.0

    def __init__(self, bits: int = 4, block: str = "tensor", span: float = 6.0):
        check(type(bits) is int and 2 <= bits <= 8, f"statistical got bits={bits}", "2 to 8")
        check_block(block in ("row", "tensor"), "statistical", block, "row or tensor")
        positive = isinstance(span, float | int) and 0 < span < inf
        check(positive, f"statistical got span={span}", "a number above 0")
        self.width, self.bins, self.span = bits, 2**bits, span
        super().__init__(block)

    def __str__(self) -> str:
        span = f"{self.span:g}"
        if float(span) != self.span:
            span = repr(float(self.span))
        return super().__str__() + ("" if self.span == 6 else f":span={span}")

    __repr__ = __str__

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        blocks, length = self.blocks(*values.shape[1:])
        x = values.reshape(len(values), blocks, length)
        mean = x.mean(2, keepdim=True)
        unit = x - mean
        # Dividing by a power of two keeps squares in float32's range and changes no rounding.
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
        """Return the means of the values with each code, 0 for unused codes: (L, blocks, bins).

        Values, of magnitude at most 4, are summed as integers, so any order gives the same bits.
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
    """Add int64 (L, blocks, n) to the sums (L, blocks, bins) of their bins, and count them."""
    places = codes.to(torch.int64) & sums.shape[2] - 1  # of NaN and infinity any
    sums.scatter_add_(2, places, values)
    counts.scatter_add_(2, places, torch.ones_like(places))


def add_by_bins(sums: Tensor, counts: Tensor, values: Tensor, codes: Tensor) -> None:
    """Do the same as `add_by_places`, one bin after another.

    On a GPU all threads would wait to add to the same few numbers.
    """
    places = codes & sums.shape[2] - 1
    for number in range(sums.shape[2]):
        chosen = places == number
        sums[..., number] += torch.where(chosen, values, 0).sum(2)
        counts[..., number] += chosen.sum(2)


@cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """Return the 2^bits rising levels that lose the least of standard normal values.

    Each level is the mean of the values that are nearest to it (Lloyd; Max, 1960); fixed-point
    iteration finds them.
    """
    half = 2 ** (bits - 1)  # levels above 0; the others are their negatives
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
    """Turn the last dimension of `x`, contiguous, in place by a fixed rotation, or turn it `back`.

    The rotation applies random signs and Hadamard transforms to segments of 2^k <= 65536 entries,
    with the largest k that fits. Where segments do not cover all entries, it does so again for the
    last 2^k entries.
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
    """Return the orthonormal Hadamard transform of the last dimension, of length 2^k.

    It is its own inverse. It consists of sums and differences of pairs, which have the same bits on
    every processor. a b numbers are arranged as an a x b matrix: first its rows are transformed,
    transposed so that they lie side by side, and then its columns.
    """
    size = x.shape[-1]
    power = size.bit_length() - 1
    width = max(1 << (power + 1) // 2, min(size, NARROW))
    columns = x.reshape(-1, width).t().contiguous()
    columns = _sums_and_differences(columns[None])[0] * size**-0.5
    matrices = columns.t().reshape(-1, size // width, width)
    return _sums_and_differences(matrices).reshape(x.shape)


def _sums_and_differences(x: Tensor) -> Tensor:
    """Return the transform of the middle dimension of x (L, 2^k, n), not divided by its length."""
    shape, signs = x.shape, _table(((1,), (-1,)), x.device)
    apart = 1
    while apart < shape[1]:
        # The products are exact, as the signs are 1 and -1.
        pairs = x.reshape(shape[0], shape[1] // (2 * apart), 2, apart * shape[2])
        x = torch.addcmul(pairs[:, :, :1], pairs[:, :, 1:], signs)
        apart *= 2
    return x.reshape(shape)


@cache
@torch.inference_mode(False)
def _signs(size: int, device: torch.device) -> Tensor:
    """Return two rows of `size` random signs, the same on every rank."""
    generator = torch.Generator("cpu").manual_seed(size)
    ones = torch.randint(2, (2, size), generator=generator, dtype=torch.int64, device="cpu")
    return (2 * ones - 1).to(device, torch.float32)


@cache
@torch.inference_mode(False)
def _table(numbers: tuple, device: torch.device) -> Tensor:
    """Return numbers as a float32 tensor on the device."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(device)
