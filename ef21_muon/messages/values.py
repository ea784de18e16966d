"""How a kept number is written: the value formats that every compressor can use.

A format turns batches of float32 numbers (L, rows, columns) into rows of bytes (L, payload_bytes)
and back; each of the L is a message of its own. Formats document their bits a value, whether they
are unbiased (E decode(encode(v)) = v), and `omega`: E ||decode(encode(v)) - v||^2 <= omega ||v||^2.
"""

import re
from math import sqrt

import torch
from torch import Generator, Tensor

from ef21_muon.messages.bits import check_length, pack, packed_bytes, reinterpret, unpack
from ef21_muon.messages.pieces import at_a_time

MANTISSA = 1 << 23  # a float32 is a sign, 8 bits of exponent and 23 bits of mantissa


class Values:
    """A value format."""

    unbiased: bool

    def omega(self, rows: int, columns: int) -> float:
        """The bound on the relative squared error, in expectation where rounding is stochastic."""
        raise NotImplementedError

    def payload_bytes(self, rows: int, columns: int) -> int:
        """Bytes that rows x columns values take."""
        raise NotImplementedError

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        """float32 (L, rows, columns) -> uint8 (L, payload_bytes(rows, columns)).

        `generator` drives stochastic rounding; None is torch's global generator.
        """
        raise NotImplementedError

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        """uint8 (L, payload_bytes) -> float32 (L, rows, columns); ValueError on another length."""
        raise NotImplementedError

    def _check(self, payload: Tensor, rows: int, columns: int) -> None:
        check_length(
            payload, self.payload_bytes(rows, columns), f"{rows} x {columns} {self} values"
        )


class Float32(Values):
    """32 bits a value, exact."""

    unbiased = True

    def __str__(self) -> str:
        return "float32"

    def omega(self, rows: int, columns: int) -> float:
        return 0.0

    def payload_bytes(self, rows: int, columns: int) -> int:
        return 4 * rows * columns

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        return values.flatten(1).contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        self._check(payload, rows, columns)
        return reinterpret(payload, torch.float32).view(-1, rows, columns)


class BFloat16(Values):
    """16 bits a value, rounded to nearest: a relative error of at most 2^-8, deterministic.

    Magnitudes below float32's normal range (2^-126) lose more.
    """

    unbiased = False

    def __str__(self) -> str:
        return "bfloat16"

    def omega(self, rows: int, columns: int) -> float:
        return 2.0**-16

    def payload_bytes(self, rows: int, columns: int) -> int:
        return 2 * rows * columns

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        return values.flatten(1).to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        self._check(payload, rows, columns)
        return reinterpret(payload, torch.bfloat16).float().view(-1, rows, columns)


class Natural(Values):
    """Sign and power-of-two exponent, 9 bits a value (Horvath et al., arXiv:1905.10988).

    |v| in [2^e, 2^(e+1)] becomes 2^(e+1) with probability |v| 2^-e - 1, else 2^e: unbiased with
    omega = 1/8. Below 2^-126 it rounds to 0 or 2^-126, still unbiased but by more than omega; above
    2^127 it may round to infinity. `stochastic=False` rounds to the nearer power: deterministic,
    biased, omega = 1/9.
    """

    def __init__(self, stochastic: bool = True):
        self.stochastic = self.unbiased = stochastic

    def __str__(self) -> str:
        return "natural" if self.stochastic else "nearest natural"

    def omega(self, rows: int, columns: int) -> float:
        return 1 / 8 if self.stochastic else 1 / 9

    def payload_bytes(self, rows: int, columns: int) -> int:
        return rows * columns + packed_bytes(rows * columns, 1)

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        bits = values.flatten(1).contiguous().view(torch.int32)
        exponents, signs = [], []
        for piece in bits.split(_chunk(bits), 1):
            rounded = _carry(piece, self.stochastic, generator).add_(piece)
            exponents.append(rounded.bitwise_right_shift_(23).to(torch.uint8))
            signs.append(pack((piece < 0).to(torch.uint8), 1))
        return torch.cat(exponents + signs, 1)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        self._check(payload, rows, columns)
        count = rows * columns
        bits = payload[:, :count].to(torch.int32).bitwise_left_shift_(23)
        bits |= unpack(payload[:, count:], count, 1).to(torch.int32).bitwise_left_shift_(31)
        return bits.view(torch.float32).view(-1, rows, columns)


class Blockwise(Values):
    """Formats with a scale a block: small codes of `width` bits, `scale_bytes` for each block.

    block: "row", "message", a number of consecutive values, or "8blocks" for so many equal blocks
    a message (fewer where it has not that many values). The fewer values share a scale, the smaller
    the error and the more scales are sent.
    """

    width: int
    scale_dtype: torch.dtype

    def __init__(self, block: int | str = "row"):
        counted = re.fullmatch(r"([1-9]\d*)blocks", block) if isinstance(block, str) else None
        known = block in ("row", "message") or counted or (type(block) is int and block > 0)
        if not known:
            raise ValueError(
                f"{type(self).__name__} got block={block}: "
                "give row, message, a number of values above 0, or of blocks as 8blocks"
            )
        self.block, self._count = block, int(counted[1]) if counted else 1

    def _told_block(self) -> str:
        return "" if self.block == "row" else f"@{self.block}"

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """How many blocks there are, and how many values each has, the last one padded."""
        if self.block == "row":
            return rows, columns
        total = rows * columns
        length = min(self.block, total) if type(self.block) is int else -(-total // self._count)
        return -(-total // length), length

    def payload_bytes(self, rows: int, columns: int) -> int:
        scales = self.blocks(rows, columns)[0] * self.scale_dtype.itemsize
        return scales + packed_bytes(rows * columns, self.width)

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        count = values.shape[1] * values.shape[2]
        blocks, length = self.blocks(*values.shape[1:])
        padding = blocks * length - count
        flat = values.flatten(1)
        padded = torch.nn.functional.pad(flat, (0, padding)) if padding else flat
        padded = padded.view(-1, blocks, length)
        # Pieces of eight blocks, or of a multiple of eight values of a single block, fill whole
        # bytes of codes.
        chunk = _chunk(padded)
        scales, codes, left = [], [], count
        for piece in padded.split(max(8, chunk // length // 8 * 8), 1):
            piece = self._rotate(piece)
            scale = self._scale(piece)
            scales.append(scale.to(self.scale_dtype).flatten(1).view(torch.uint8))
            for part in piece.split(chunk if piece.shape[1] == 1 else length, 2):
                part_codes = self._quantise(part, scale, generator).flatten(1)[:, :left]
                left -= part_codes.shape[1]
                codes.append(pack(part_codes, self.width))
        return torch.cat(scales + codes, 1)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        self._check(payload, rows, columns)
        count = rows * columns
        blocks, length = self.blocks(rows, columns)
        split = blocks * self.scale_dtype.itemsize
        scales = reinterpret(payload[:, :split], self.scale_dtype).view(-1, blocks, 1)
        codes = unpack(payload[:, split:], count, self.width)
        codes = torch.nn.functional.pad(codes, (0, blocks * length - count))
        values = self._rotate_back_(self._restore(scales, codes.view(-1, blocks, length)))
        return values.flatten(1)[:, :count].reshape(-1, rows, columns)

    def _rotate(self, values: Tensor) -> Tensor:
        """What is done to blocks (L, blocks, length) before they are coded."""
        return values

    def _rotate_back_(self, values: Tensor) -> Tensor:
        """Its inverse, in place."""
        return values

    def _scale(self, values: Tensor) -> Tensor:
        """(L, blocks, length) -> (L, blocks, 1)."""
        raise NotImplementedError

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        """Codes of values (L, blocks, any part of the length), uint8 of the same shape."""
        raise NotImplementedError

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        raise NotImplementedError


class NaturalWindow(Blockwise):
    """Natural values within 2^b - 1 exponents of the block's largest; 1 + b bits a value.

    b = `exponent_bits`, 3 to 7; one byte a block tells the largest exponent. Let s be the smallest
    magnitude of the window: |v| < s becomes s with probability |v| / s, else 0, so it is unbiased.
    With N values in a block, whose largest is at least s 2^(2^b - 3),
    omega = 1/8 + min(N / 4 * 4^(3 - 2^b), sqrt(N) 2^(3 - 2^b)).
    `stochastic=False` rounds to the nearer of the two: deterministic, biased, omega = 1/9 plus
    N / 4 * 4^(3 - 2^b), at most 1.
    """

    scale_dtype = torch.uint8

    def __init__(self, exponent_bits: int = 4, stochastic: bool = True, block: int | str = "row"):
        if not (type(exponent_bits) is int and 3 <= exponent_bits <= 7):
            raise ValueError(f"natural got exponent_bits={exponent_bits}: give 3 to 7 (8: natural)")
        self.exponent_bits, self.width = exponent_bits, exponent_bits + 1
        self.stochastic = self.unbiased = stochastic
        super().__init__(block)

    def __str__(self) -> str:
        nearest = "" if self.stochastic else "nearest "
        return f"{nearest}natural{self.exponent_bits}{self._told_block()}"

    def omega(self, rows: int, columns: int) -> float:
        length = self.blocks(rows, columns)[1]
        smallest = 2.0 ** (3 - 2**self.exponent_bits)  # over the block's largest magnitude
        if self.stochastic:
            return 1 / 8 + min(length / 4 * smallest**2, sqrt(length) * smallest)
        return min(1.0, 1 / 9 + length / 4 * smallest**2)

    def _scale(self, values: Tensor) -> Tensor:
        """The exponent of the least power of two that no magnitude exceeds."""
        largest = values.abs().amax(2, keepdim=True).view(torch.int32)
        return (largest + (MANTISSA - 1)) >> 23

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        bits = values.contiguous().view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        carry = _carry(bits, self.stochastic, generator)
        smallest = self._smallest(scale)
        share = values.abs() / (smallest << 23).view(torch.float32)
        # A uniform carry is below share * 2^23 with probability share; the constant one of rounding
        # to nearest where the share is over a half.
        level = torch.where(
            magnitude < smallest << 23,
            (carry < share * MANTISSA).to(torch.int32),
            ((magnitude + carry) >> 23) - smallest + 1,
        )
        return (level << 1 | (bits < 0)).to(torch.uint8)

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        bits = (codes >> 1).to(torch.int32).add_(self._smallest(scales.to(torch.int32)) - 1)
        bits.masked_fill_(codes < 2, 0).bitwise_left_shift_(23)
        bits |= (codes & 1).to(torch.int32).bitwise_left_shift_(31)
        return bits.view(torch.float32)

    def _smallest(self, largest: Tensor) -> Tensor:
        """The exponent of level 1; level 2^b - 1 is the largest, level 0 is zero."""
        return (largest - (2**self.exponent_bits - 2)).clamp_min(1)


class Integer(Blockwise):
    """`bits`-bit integers times a float32 scale a block, with dithering (QSGD, arXiv:1610.02132).

    With s = 2^(bits-1) - 1 levels a side, v becomes a neighbouring multiple of max |v| / s, chosen
    so that it is unbiased; omega = min(N / (4 s^2), sqrt(N) / s) for N values in a block.
    `stochastic=False` takes the nearer one: deterministic, biased, omega = min(1, N / (4 s^2)).
    """

    scale_dtype = torch.float32

    def __init__(self, bits: int = 8, stochastic: bool = True, block: int | str = "row"):
        if not (type(bits) is int and 2 <= bits <= 8):
            raise ValueError(f"int got bits={bits}: give 2 to 8")
        self.width, self.levels = bits, 2 ** (bits - 1) - 1
        self.stochastic = self.unbiased = stochastic
        super().__init__(block)

    def __str__(self) -> str:
        return f"{'' if self.stochastic else 'nearest '}int{self.width}{self._told_block()}"

    def omega(self, rows: int, columns: int) -> float:
        length = self.blocks(rows, columns)[1]
        spread = length / (4 * self.levels**2)
        return min(spread, sqrt(length) / self.levels) if self.stochastic else min(1.0, spread)

    def _scale(self, values: Tensor) -> Tensor:
        return values.abs().amax(2, keepdim=True)

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        steps = values / scale.masked_fill(scale == 0, 1) * self.levels
        if self.stochastic:
            steps += torch.rand(
                steps.shape, generator=generator, dtype=torch.float32, device=steps.device
            )
        else:
            steps += 0.5
        codes = steps.floor_().clamp_(-self.levels, self.levels).add_(self.levels)
        return codes.to(torch.uint8)

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        # By a number, a GPU would not divide but multiply with its inverse.
        scales = scales / torch.full_like(scales, self.levels)
        return codes.float().sub_(self.levels).mul_(scales)


class SignScale(Blockwise):
    """The sign times the block's mean magnitude: 1 bit a value, deterministic, biased.

    omega = 1 - 1/N for N values in a block, reached where a single one is not zero; about 0.36 for
    Gaussian values.
    """

    scale_dtype = torch.float32
    unbiased = False
    width = 1

    def __str__(self) -> str:
        return f"sign{self._told_block()}"

    def omega(self, rows: int, columns: int) -> float:
        return 1 - 1 / self.blocks(rows, columns)[1]

    def _scale(self, values: Tensor) -> Tensor:
        return values.abs().mean(2, keepdim=True)

    def _quantise(self, values: Tensor, scale: Tensor, generator: Generator | None) -> Tensor:
        return (values < 0).to(torch.uint8)

    def _restore(self, scales: Tensor, codes: Tensor) -> Tensor:
        return codes.float().mul_(-2).add_(1).mul_(scales)


def _chunk(messages: Tensor) -> int:
    """Values of each of these messages to encode at a time, a multiple of 8."""
    return max(8, at_a_time(messages.device) // max(1, len(messages)) // 8 * 8)


def _carry(bits: Tensor, stochastic: bool, generator: Generator | None) -> Tensor:
    """What to add to a mantissa f so that it carries into the exponent: |v| = 2^e (1 + f).

    A uniform 23-bit number carries with probability f; a constant half rounds to nearest.
    """
    if stochastic:
        return torch.randint(
            MANTISSA, bits.shape, generator=generator, dtype=torch.int32, device=bits.device
        )
    return torch.full_like(bits, MANTISSA // 2)
