"""Value formats of small codes with a scale per block, or per row and per column."""

import re
from math import sqrt

import torch
from torch import Generator, Tensor

from ef21_muon.checks.renamed import refuses_renamed
from ef21_muon.values.base import (
    MANTISSA,
    ValueFormat,
    at_a_time,
    carry,
    check,
    check_block,
    check_length,
    pack,
    packed_bytes,
    reinterpret,
    unpack,
)


class Blockwise(ValueFormat):
    """The base class of formats with codes of `width` bits and scales for each block of values.

    Subclasses implement `_scale(blocks)` for blocks (L, blocks, length), `_quantise(values, scale,
    generator)`, the codes of any part of the length, and `_restore(scales, codes)`, the values.
    There are `scales` scales of `scale_dtype` per block.

    Args:
        block: the values that share a scale: "row" (default), "tensor" (the whole matrix), a
            number of consecutive values above 0, or "8blocks" for so many equal blocks per matrix
            (fewer for a matrix with fewer values).

    Raises:
        ValueError: if `block` is none of these.
    """

    width: int
    scales, scale_dtype = 1, torch.float32  # the number of scales per block, and their dtype
    default_block = "row"

    def __init__(self, block: int | str = "row"):
        counted = re.fullmatch(r"([1-9]\d*)blocks", block) if isinstance(block, str) else None
        known = block in ("row", "tensor") or counted or (type(block) is int and block > 0)
        allowed = "row, tensor, a number of values above 0, or of blocks as 8blocks"
        check_block(known, type(self).__name__, block, allowed)
        self.block, self._count = block, int(counted[1]) if counted else 1

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the number of blocks and of values per block; the last block is padded."""
        if self.block == "row":
            return rows, columns
        total = rows * columns
        length = min(self.block, total) if type(self.block) is int else -(-total // self._count)
        return -(-total // length), length

    def payload_bytes(self, rows: int, columns: int) -> int:
        scales = self.blocks(rows, columns)[0] * self.scales
        return scales * self.scale_dtype.itemsize + packed_bytes(rows * columns, self.width)

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        count = values.shape[1] * values.shape[2]
        blocks, length = self.blocks(*values.shape[1:])
        padded = values.flatten(1)
        if padding := blocks * length - count:
            padded = torch.nn.functional.pad(padded, (0, padding))
        padded = padded.view(-1, blocks, length)
        # The codes of eight blocks, or of eight values of a single block, fill whole bytes.
        chunk = at_a_time(padded)
        scales, codes, left = [], [], count
        for piece in padded.split(max(8, chunk // length // 8 * 8), 1):
            piece = self._turned(piece)
            scale = self._scale(piece)
            scales.append(scale.to(self.scale_dtype).flatten(1).view(torch.uint8))
            for part in piece.split(chunk if piece.shape[1] == 1 else length, 2):
                part_codes = self._quantise(part, scale, generator).flatten(1)[:, :left]
                left -= part_codes.shape[1]
                codes.append(pack(part_codes, self.width))
        return torch.cat(scales + codes, 1)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        check_length(payload, self.payload_bytes(rows, columns), self, rows, columns)
        count = rows * columns
        blocks, length = self.blocks(rows, columns)
        split = blocks * self.scales * self.scale_dtype.itemsize
        scales = reinterpret(payload[:, :split], self.scale_dtype).view(-1, blocks, self.scales)
        codes = unpack(payload[:, split:], count, self.width)
        codes = torch.nn.functional.pad(codes, (0, blocks * length - count))
        values = self._restore(scales, codes.view(-1, blocks, length))
        return self._turned(values, back=True).flatten(1)[:, :count].reshape(-1, rows, columns)

    def _scale(self, blocks: Tensor) -> Tensor:
        raise NotImplementedError

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        raise NotImplementedError

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def _turned(self, values: Tensor, back: bool = False) -> Tensor:
        """Transform blocks (L, blocks, length) before they are coded, or, in place, `back`."""
        return values


class NaturalWindow(Blockwise):
    """Powers of two within a window below the block's largest magnitude: 1 + b bits per value.

    b = `exponent_bits`. A code holds the sign and one of 2^b - 1 exponents, or zero; the largest
    exponent takes one byte per block. |v| is rounded to a neighbouring power of two as `Natural`
    does; below the window's smallest magnitude s it becomes s with probability |v| / s, else 0.
    This is unbiased. For N values per block, and if the largest is at least s 2^(2^b - 3),

        omega = 1/8 + min(N / 4 * 4^(3 - 2^b), sqrt(N) 2^(3 - 2^b)).

    Args:
        exponent_bits: b, the bits of an exponent, 3 to 7; default 4.
        rounding: "stochastic" (default) as above, or "nearest": deterministic, biased,
            omega = min(1, 1/9 + N / 4 * 4^(3 - 2^b)).
        block: the values that share a scale: "row" (default), "tensor", a number of consecutive
            values, or "8blocks" for 8 equal blocks per matrix.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> NaturalWindow(4, block=128)
        natural4@128
    """

    name = "natural{.exponent_bits}"
    scale_dtype = torch.uint8

    @refuses_renamed
    def __init__(
        self, exponent_bits: int = 4, rounding: str = "stochastic", block: int | str = "row"
    ):
        whole = type(exponent_bits) is int and 3 <= exponent_bits <= 7
        check(whole, f"natural got exponent_bits={exponent_bits}", "3 to 7 (8: natural)")
        super().__init__(block)
        self.exponent_bits, self.width = exponent_bits, exponent_bits + 1
        self.set_rounding(rounding)

    def omega(self, rows: int, columns: int) -> float:
        length = self.blocks(rows, columns)[1]
        smallest = 2.0 ** (3 - 2**self.exponent_bits)  # relative to the block's largest magnitude
        if self.unbiased:
            return 1 / 8 + min(length / 4 * smallest**2, sqrt(length) * smallest)
        return min(1.0, 1 / 9 + length / 4 * smallest**2)

    def _scale(self, values: Tensor) -> Tensor:
        """Return the exponent of the least power of two that no magnitude exceeds."""
        largest = values.abs().amax(2, keepdim=True).view(torch.int32)
        return (largest + (MANTISSA - 1)) >> 23

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        bits = values.contiguous().view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        carried = carry(bits, self.unbiased, generator)
        smallest = self._smallest(scale)
        share = values.abs() / (smallest << 23).view(torch.float32)
        # A uniform carry is below share * 2^23 with probability share; one half is if share > 1/2.
        below = (carried < share * MANTISSA).to(torch.int32)
        within = ((magnitude + carried) >> 23) - smallest + 1
        level = torch.where(magnitude < smallest << 23, below, within)
        return (level << 1 | (bits < 0)).to(torch.uint8)

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        bits = (codes >> 1).to(torch.int32).add_(self._smallest(scales.to(torch.int32)) - 1)
        bits.masked_fill_(codes < 2, 0).bitwise_left_shift_(23)
        bits |= (codes & 1).to(torch.int32).bitwise_left_shift_(31)
        return bits.view(torch.float32)

    def _smallest(self, largest: Tensor) -> Tensor:
        """Return the exponent of level 1; level 2^b - 1 is the largest, and level 0 is zero."""
        return (largest - (2**self.exponent_bits - 2)).clamp_min(1)


class Integer(Blockwise):
    """Integers of `bits` bits times a float32 scale per block, dithered as in QSGD.

    With s = 2^(bits - 1) - 1, v becomes one of the two neighbouring multiples of max |v| / s, at
    random without a bias. For N values per block omega = min(N / (4 s^2), sqrt(N) / s).

    Args:
        bits: the bits per value, 2 to 8; default 8.
        rounding: "stochastic" (default) as above, or "nearest": deterministic, biased,
            omega = min(1, N / (4 s^2)).
        block: the values that share a scale: "row" (default), "tensor", a number of consecutive
            values, or "8blocks" for 8 equal blocks per matrix.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> Integer(4, block=128).payload_bytes(64, 128)  # 64 scales of 4 bytes, 4 bits per value
        4352

    References:
        Alistarh et al., QSGD (arXiv:1610.02132).
    """

    name = "int{.width}"

    @refuses_renamed
    def __init__(self, bits: int = 8, rounding: str = "stochastic", block: int | str = "row"):
        check(type(bits) is int and 2 <= bits <= 8, f"int got bits={bits}", "2 to 8")
        super().__init__(block)
        self.width, self.levels = bits, 2 ** (bits - 1) - 1
        self.set_rounding(rounding)

    def omega(self, rows: int, columns: int) -> float:
        length = self.blocks(rows, columns)[1]
        spread = length / (4 * self.levels**2)
        return min(spread, sqrt(length) / self.levels if self.unbiased else 1.0)

    def _scale(self, values: Tensor) -> Tensor:
        return values.abs().amax(2, keepdim=True)

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        steps = values / scale.masked_fill(scale == 0, 1) * self.levels
        options = {"generator": generator, "dtype": torch.float32, "device": steps.device}
        steps += torch.rand(steps.shape, **options) if self.unbiased else 0.5
        codes = steps.floor_().clamp_(-self.levels, self.levels).add_(self.levels)
        return codes.to(torch.uint8)

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        # A tensor, since a GPU multiplies with the inverse of a number instead of dividing by it.
        scales = scales / torch.full_like(scales, self.levels)
        return codes.float().sub_(self.levels).mul_(scales)


class SignScale(Blockwise):
    """The sign times the mean magnitude of the block: 1 bit per value, and 32 per block.

    Deterministic and biased, with omega = 1 - 1/N for N values per block. A block with a single
    entry that is not zero loses as much; Gaussian values lose about 0.36.

    Args:
        block: the values that share a scale: "row" (default), "tensor", a number of consecutive
            values, or "8blocks" for 8 equal blocks per matrix.

    Raises:
        ValueError: if `block` is none of these.

    Example:
        >>> values = SignScale()
        >>> values.decode(values.encode(torch.tensor([[[1.0, -3.0]]])), 1, 2)
        tensor([[[ 2., -2.]]])

    References:
        Bernstein et al., signSGD (arXiv:1802.04434). Karimireddy et al., error feedback for it
        (arXiv:1901.09847), with this scale.
    """

    name, width = "sign", 1

    def omega(self, rows: int, columns: int) -> float:
        return 1 - 1 / self.blocks(rows, columns)[1]

    def _scale(self, values: Tensor) -> Tensor:
        return values.abs().mean(2, keepdim=True)

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        return values < 0

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        return codes.float().mul_(-2).add_(1).mul_(scales)


class RowColumn(ValueFormat):
    """Dithered integers with a scale per row and a scale per column.

        C(x) = Q(x D^(-1/2)) D^(1/2),  D_j = max_i |x_ij|

    Q is `Integer` with a scale per row, and D is a diagonal matrix that takes 2 bytes per column
    (bfloat16). With s = 2^(bits - 1) - 1 and N = m n values,

        omega = (1 + 2^-7) min(sqrt(N) / (4 s^2), N^(1/4) / s),

    since the scale of row i is at most sqrt(r_i), r_i = max_j |x_ij|, and
    sum_ij r_i D_j <= sqrt(N) ||x||^2. It works for magnitudes from 1e-37 to 1e38.

    Smoothness-aware quantisation takes for D the diagonal of the matrix for which a worker's
    function is smooth. For a linear layer that matrix is about E delta_i^2 E a_j^2, for output i
    and input j, and max_i |x_ij| grows with the root of E a_j^2.

    Args:
        bits: the bits per value, 2 to 8; default 4.
        rounding: "stochastic" (default), which is unbiased, or "nearest": deterministic, biased,
            with the first bound of the two, at most 1.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> RowColumn(4, rounding="nearest")
        rowcol4:nearest

    References:
        Wang, Safaryan and Richtarik, smoothness-aware quantisation (arXiv:2106.03524). Martens and
        Grosse, K-FAC (arXiv:1503.05671), for the matrix of a linear layer.
    """

    name = "rowcol{.integers.width}"

    @refuses_renamed
    def __init__(self, bits: int = 4, rounding: str = "stochastic"):
        check(type(bits) is int and 2 <= bits <= 8, f"rowcol got bits={bits}", "2 to 8")
        self.integers = Integer(bits, rounding)
        self.set_rounding(rounding)

    def omega(self, rows: int, columns: int) -> float:
        total, levels = rows * columns, self.integers.levels
        spread = (1 + 2**-7) * sqrt(total) / (4 * levels**2)
        return min(spread, (1 + 2**-7) * total**0.25 / levels if self.unbiased else 1.0)

    def payload_bytes(self, rows: int, columns: int) -> int:
        return 2 * columns + self.integers.payload_bytes(rows, columns)

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        largest = values.abs().amax(1).to(torch.bfloat16)
        codes = self.integers.encode(values / _root_of(largest), generator)
        return torch.cat([largest.view(torch.uint8), codes], 1)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        check_length(payload, self.payload_bytes(rows, columns), self, rows, columns)
        split = 2 * columns
        largest = reinterpret(payload[:, :split], torch.bfloat16)
        return self.integers.decode(payload[:, split:], rows, columns).mul_(_root_of(largest))


def _root_of(largest: Tensor) -> Tensor:
    """Return D^(1/2) for D (L, columns) as (L, 1, columns), with 1 in place of 0.

    The root is taken in float64, since not every library rounds the root of a float32 correctly.
    """
    return largest.masked_fill(largest == 0, 1).double().sqrt().float()[:, None]
