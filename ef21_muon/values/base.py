"""Value formats, by which numbers become bytes, and the packing of small integers.

A format writes float32 numbers (L, rows, columns) as L messages, whose size follows from the counts
alone. Formats document their bits per value, whether they are unbiased (E decode(encode(v)) = v),
and `omega`: E ||decode(encode(v)) - v||^2 <= omega ||v||^2. Words are little-endian.
"""

from collections import defaultdict
from functools import cache
from numbers import Real

import torch
from torch import Generator, Tensor

ROUNDINGS = ("stochastic", "nearest")
MANTISSA = 1 << 23  # a float32 is a sign, 8 bits of exponent and 23 bits of mantissa
# Entries by type of device: temporaries stay small, a GPU's work is longer than its launches.
AT_A_TIME = defaultdict(lambda: 1 << 20, cuda=1 << 24)


class Codec:
    """Matrices as rows of bytes: a value format, or a compressor that writes in one."""

    def payload_bytes(self, m: int, n: int) -> int:
        """Bytes of the message for one m x n matrix."""
        raise NotImplementedError

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """float32 (L, m, n) -> uint8 (L, payload_bytes(m, n)); None is torch's global generator."""
        raise NotImplementedError

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        """uint8 (L, payload_bytes(m, n)) -> float32 (L, m, n); ValueError on another length."""
        raise NotImplementedError


class ValueFormat(Codec):
    """A value format."""

    name: str  # of the class, with attributes as {.width}
    error: float  # omega, where it does not depend on the shape
    unbiased = False
    rounding: str | None = None  # None where it is not a choice
    block: int | str | None = None  # of values that share a scale
    default_block: str | None = None

    def __str__(self) -> str:
        block = "" if self.block == self.default_block else f"@{self.block}"
        rounding = ":nearest" if self.rounding == "nearest" else ""
        return f"{self.name.format(self)}{block}{rounding}"

    __repr__ = __str__

    def set_rounding(self, rounding: str) -> None:
        """Round to nearest, or stochastically, without a bias. Raises ValueError for others."""
        check(
            rounding in ROUNDINGS,
            f"{type(self).__name__} got rounding={rounding}",
            "nearest or stochastic",
        )
        self.rounding, self.unbiased = rounding, rounding == "stochastic"

    def omega(self, rows: int, columns: int) -> float:
        """The bound on the relative squared error, in expectation where rounding is stochastic."""
        return self.error


class Plain(ValueFormat):
    """Numbers of a type of torch's."""

    dtype: torch.dtype

    def payload_bytes(self, rows: int, columns: int) -> int:
        return self.dtype.itemsize * rows * columns

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        return values.flatten(1).to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        check_length(payload, self.dtype.itemsize * rows * columns, self, rows, columns)
        return reinterpret(payload, self.dtype).float().view(-1, rows, columns)


class Float32(Plain):
    """32 bits per value, exact."""

    name, dtype, error, unbiased = "float32", torch.float32, 0.0, True


class BFloat16(Plain):
    """16 bits per value, rounded to nearest: a relative error of at most 2^-8, deterministic.

    Magnitudes below float32's normal range (2^-126) lose more.
    """

    name, dtype, error = "bfloat16", torch.bfloat16, 2.0**-16


class Natural(ValueFormat):
    """Sign and power-of-two exponent, 9 bits per value (Horvath et al., arXiv:1905.10988).

    |v| in [2^e, 2^(e+1)] becomes 2^(e+1) with probability |v| 2^-e - 1, else 2^e: unbiased,
    omega = 1/8 (more below 2^-126; above 2^127 it may be infinity). rounding="nearest" takes the
    nearer power: deterministic, biased, omega = 1/9.
    """

    name = "natural"

    def __init__(self, rounding: str = "stochastic"):
        self.set_rounding(rounding)
        self.error = 1 / 8 if self.unbiased else 1 / 9

    def payload_bytes(self, rows: int, columns: int) -> int:
        return rows * columns + packed_bytes(rows * columns, 1)

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        bits = values.flatten(1).contiguous().view(torch.int32)
        exponents, signs = [], []
        for piece in bits.split(at_a_time(bits), 1):
            rounded = carry(piece, self.unbiased, generator).add_(piece)
            exponents.append(rounded.bitwise_right_shift_(23).to(torch.uint8))
            signs.append(pack(piece < 0, 1))
        return torch.cat(exponents + signs, 1)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        check_length(payload, self.payload_bytes(rows, columns), self, rows, columns)
        count = rows * columns
        bits = payload[:, :count].to(torch.int32).bitwise_left_shift_(23)
        bits |= unpack(payload[:, count:], count, 1).to(torch.int32).bitwise_left_shift_(31)
        return bits.view(torch.float32).view(-1, rows, columns)


def check(holds: bool, given: str, allowed: str) -> None:
    """Raise ValueError unless it holds: what was given, and what is allowed."""
    if not holds:
        raise ValueError(f"{given}: give {allowed}")


def check_share(given: str, share: float) -> None:
    """Raise ValueError unless it is a number in (0, 1]."""
    number = isinstance(share, Real) and 0 < share <= 1
    check(number, f"{given}={share}", "a number above 0, at most 1")


def at_a_time(messages: Tensor) -> int:
    """Values of each of these messages (L, ...) to encode at a time, a multiple of 8."""
    return max(8, AT_A_TIME[messages.device.type] // max(1, len(messages)) // 8 * 8)


def carry(bits: Tensor, stochastic: bool, generator: Generator | None) -> Tensor:
    """What makes a mantissa f carry into the exponent, if it is added.

    A uniform 23-bit number carries with probability f; a constant half rounds to nearest.
    """
    if stochastic:
        options = {"generator": generator, "dtype": torch.int32, "device": bits.device}
        return torch.randint(MANTISSA, bits.shape, **options)
    return torch.full_like(bits, MANTISSA // 2)


def check_length(payload: Tensor, expected: int, codec: object, rows: int, columns: int) -> None:
    """Raise ValueError unless every row of `payload` has the bytes that the codec expects."""
    if payload.shape[1] != expected:
        raise wrong_length(payload, expected, f"{codec} of {rows} x {columns}")


def wrong_length(payload: Tensor, expected: int, what: str) -> ValueError:
    return ValueError(
        f"a payload of {payload.shape[1]} bytes was given where {what} takes {expected}: "
        "sender and receiver must use the same compressor and shape"
    )


def reinterpret(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of bytes, at any offset of a larger buffer, read as rows of numbers."""
    return payload.clone(memory_format=torch.contiguous_format).view(dtype)


@cache
def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` integers of `width` bits take: whole bytes apart, the rest bit-packed."""
    return count * (width // 8) + (count * (width % 8) + 7) // 8


def pack(codes: Tensor, width: int) -> Tensor:
    """Integers (L, n) in [0, 2^width), width 0 to 32, as uint8 (L, packed_bytes(n, width)).

    Their low bytes, then the next ones, and at last eight by eight what is left of them.
    """
    (rows, count), (planes, rest) = codes.shape, divmod(width, 8)
    parts = []
    for plane in range(planes):
        parts.append((codes >> 8 * plane & 0xFF).to(torch.uint8))
    if rest or not planes:
        eights = codes.new_zeros(rows, (count + 7) // 8, 8, dtype=torch.uint8)
        eights.flatten(1)[:, :count] = codes >> 8 * planes if planes else codes
        words = eights.view(torch.int64).flatten()
        for some in words.split(max(1, AT_A_TIME[words.device.type] // 8)):
            for apart, _, mask, by in _shifts(rest):
                some.sub_((some >> apart).bitwise_and_(mask), alpha=by)
        parts.append(eights[..., :rest].flatten(1)[:, : packed_bytes(count, rest)])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def unpack(packed: Tensor, count: int, width: int) -> Tensor:
    """Undo `pack`: (L, count), uint8 for widths up to 8, int64 beyond; ValueError as decode."""
    if packed.shape[1] != packed_bytes(count, width):
        what = f"{count} integers of {width} bits"
        raise wrong_length(packed, packed_bytes(count, width), what)
    if width == 8:
        return packed
    rows, (planes, rest) = len(packed), divmod(width, 8)
    eights = packed.new_zeros(rows, (count + 7) // 8, rest)
    eights.flatten(1)[:, : packed_bytes(count, rest)] = packed[:, planes * count :]
    eights = torch.nn.functional.pad(eights, (0, 8 - rest))
    words = eights.view(torch.int64).flatten()
    for some in words.split(max(1, AT_A_TIME[words.device.type] // 8)):
        for _, together, mask, by in reversed(_shifts(rest)):
            some.add_((some >> together).bitwise_and_(mask), alpha=by)
    codes = eights.flatten(1)[:, :count]
    if planes:
        codes = codes.to(torch.int64) << 8 * planes
    for plane in range(planes):
        codes |= packed[:, plane * count : (plane + 1) * count].to(torch.int64) << 8 * plane
    return codes


@cache
def _shifts(width: int) -> tuple[tuple[int, int, int, int], ...]:
    """How eight codes, a byte each of a word, become neighbours: pairs, then fours, then all.

    Bits that halves are apart, before and after; a mask of low halves; what a high half changes by.
    """
    steps = []
    for apart in (8, 16, 32):
        together = apart * width // 8
        mask = sum((1 << together) - 1 << place for place in range(0, 64, 2 * apart))
        steps.append((apart, together, mask, (1 << apart) - (1 << together)))
    return tuple(steps)
