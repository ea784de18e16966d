"""The base classes of value formats, the formats of single numbers, and the packing of integers.

A value format writes float32 numbers (L, rows, columns) as L messages, uint8 (L, bytes), whose size
depends on rows and columns alone. It documents its bits per value, whether it is unbiased, that is
E decode(encode(v)) = v, and `omega`, the bound in E ||decode(encode(v)) - v||^2 <= omega ||v||^2.
Numbers are little-endian.
"""

from collections import defaultdict
from functools import cache
from numbers import Real

import torch
from torch import Generator, Tensor

from ef21_muon.checks.renamed import refuses_renamed, renamed_value

ROUNDINGS = ("stochastic", "nearest")
MANTISSA = 1 << 23  # a float32 is a sign, 8 bits of exponent and 23 bits of mantissa
# Entries to encode at a time, by type of device: few enough for small temporaries, and on a GPU
# enough that the work takes longer than its launch.
AT_A_TIME = defaultdict(lambda: 1 << 20, cuda=1 << 24)


class Codec:
    """Matrices as rows of bytes: the base class of value formats and of compressors."""

    def payload_bytes(self, m: int, n: int) -> int:
        """Return the bytes of the message for one m x n matrix."""
        raise NotImplementedError

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the messages for matrices, one row of bytes per matrix.

        Args:
            x: float32 matrices (L, m, n).
            generator: the source of random numbers, on the device of `x`; default None, which is
                torch's global generator.

        Returns:
            uint8 (L, payload_bytes(m, n)).
        """
        raise NotImplementedError

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        """Return the matrices that messages hold.

        Args:
            payload: messages, uint8 (L, payload_bytes(m, n)).
            m: the number of rows.
            n: the number of columns.

        Returns:
            float32 (L, m, n).

        Raises:
            ValueError: if the messages have another length.
        """
        raise NotImplementedError


class ValueFormat(Codec):
    """The base class of value formats, which write the numbers of a message as bytes.

    Subclasses implement `payload_bytes(rows, columns)`, `encode(values, generator)`,
    `decode(payload, rows, columns)` and `omega(rows, columns)`. They set `name`, from which the
    spec is made: "{.width}" in it is replaced by the attribute `width`.

    Attributes:
        unbiased: whether E decode(encode(v)) = v.
        rounding: "stochastic" or "nearest"; None for formats without this choice.
        block: the block of values that share a scale; None for formats without blocks.

    Example:
        >>> [Float32(), Natural("nearest")]  # their specs
        [float32, natural:nearest]
    """

    name: str  # the format's name in specs, with attributes in braces: "int{.width}"
    error: float  # omega, if it does not depend on the shape
    unbiased = False
    rounding: str | None = None  # None if the format has no choice
    block: int | str | None = None  # the block of values that share a scale
    default_block: str | None = None

    def __str__(self) -> str:
        """Return the spec, from which `value_format` builds an equal format."""
        block = "" if self.block == self.default_block else f"@{self.block}"
        rounding = ":nearest" if self.rounding == "nearest" else ""
        return f"{self.name.format(self)}{block}{rounding}"

    __repr__ = __str__

    def set_rounding(self, rounding: str) -> None:
        """Set the rounding: "stochastic", which has no bias, or "nearest".

        Raises:
            ValueError: for any other word.
        """
        check(
            rounding in ROUNDINGS,
            f"{type(self).__name__} got rounding={rounding}",
            "nearest or stochastic",
        )
        self.rounding, self.unbiased = rounding, rounding == "stochastic"

    def omega(self, rows: int, columns: int) -> float:
        """Return the bound on the relative squared error for rows x columns values.

        With stochastic rounding the bound holds in expectation.
        """
        return self.error


class Plain(ValueFormat):
    """The base class of formats that store numbers in a dtype of torch."""

    dtype: torch.dtype

    def payload_bytes(self, rows: int, columns: int) -> int:
        return self.dtype.itemsize * rows * columns

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        return values.flatten(1).to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        check_length(payload, self.dtype.itemsize * rows * columns, self, rows, columns)
        return reinterpret(payload, self.dtype).float().view(-1, rows, columns)


class Float32(Plain):
    """Float32 numbers: 32 bits per value, exact, omega = 0.

    Example:
        >>> Float32().payload_bytes(2, 3)
        24
    """

    name, dtype, error, unbiased = "float32", torch.float32, 0.0, True


class BFloat16(Plain):
    """Bfloat16 numbers: 16 bits per value, rounded to nearest, deterministic.

    The relative error of a value is at most 2^-8, so omega = 2^-16. It is larger for magnitudes
    below 2^-126, float32's normal range.

    Example:
        >>> BFloat16().payload_bytes(2, 3)
        12
    """

    name, dtype, error = "bfloat16", torch.bfloat16, 2.0**-16


class Natural(ValueFormat):
    """Natural compression: the sign and a power of two, 9 bits per value.

    |v| in [2^e, 2^(e+1)] becomes 2^(e+1) with probability |v| 2^-e - 1, else 2^e. This is unbiased
    with omega = 1/8; omega is larger below 2^-126, and above 2^127 the result may be infinite.

    Args:
        rounding: "stochastic" (default) as above, or "nearest", which takes the nearer power:
            deterministic, biased, omega = 1/9.

    Raises:
        ValueError: if `rounding` is neither.

    Example:
        >>> values = Natural("nearest")
        >>> values.decode(values.encode(torch.tensor([[[3.0, -5.0]]])), 1, 2)
        tensor([[[ 4., -4.]]])

    References:
        Horvath et al., Natural compression (arXiv:1905.10988).
    """

    name = "natural"

    @refuses_renamed
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
    """Raise ValueError unless `holds`, with the words "given: give allowed"."""
    if not holds:
        raise ValueError(f"{given}: give {allowed}")


def check_block(holds: object, name: str, block: object, allowed: str) -> None:
    """Raise ValueError for a block that a format does not have, unless `holds`."""
    hint = renamed_value("block", block) or f"give {allowed}"
    if not holds:
        raise ValueError(f"{name} got block={block}: {hint}")


def check_share(given: str, share: float) -> None:
    """Raise ValueError unless `share` is a number in (0, 1]."""
    number = isinstance(share, Real) and 0 < share <= 1
    check(number, f"{given}={share}", "a number above 0, at most 1")


def at_a_time(messages: Tensor) -> int:
    """Return how many values of each message (L, ...) to encode at a time, a multiple of 8."""
    return max(8, AT_A_TIME[messages.device.type] // max(1, len(messages)) // 8 * 8)


def carry(bits: Tensor, stochastic: bool, generator: Generator | None) -> Tensor:
    """Return the numbers that round float32 bit patterns when they are added to them.

    The sum carries into the exponent, so that a mantissa f becomes the next power of two. A uniform
    23-bit number carries with probability f; the constant one half rounds to nearest.
    """
    if stochastic:
        return torch.randint(
            MANTISSA, bits.shape, generator=generator, dtype=torch.int32, device=bits.device
        )
    return torch.full_like(bits, MANTISSA // 2)


def check_length(payload: Tensor, expected: int, codec: object, rows: int, columns: int) -> None:
    """Raise ValueError unless every row of `payload` has as many bytes as the codec expects."""
    if payload.shape[1] != expected:
        raise wrong_length(payload, expected, f"{codec} of {rows} x {columns}")


def wrong_length(payload: Tensor, expected: int, what: str) -> ValueError:
    """Return the error for messages whose length is not the expected one."""
    return ValueError(
        f"a payload of {payload.shape[1]} bytes was given where {what} takes {expected}: "
        "sender and receiver must use the same compressor and shape"
    )


def reinterpret(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of bytes, at any offset of a larger buffer, as rows of numbers of a dtype."""
    return payload.clone(memory_format=torch.contiguous_format).view(dtype)


@cache
def packed_bytes(count: int, width: int) -> int:
    """Return the bytes that `count` integers of `width` bits take.

    Whole bytes are stored apart, and the remaining bits are packed.
    """
    return count * (width // 8) + (count * (width % 8) + 7) // 8


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack integers of `width` bits into bytes.

    First come the low bytes of all integers, then their next bytes, and at the end the remaining
    bits, eight integers at a time.

    Args:
        codes: integers (L, n) in [0, 2^width).
        width: the number of bits, 0 to 32.

    Returns:
        uint8 (L, packed_bytes(n, width)).
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
    """Undo `pack`.

    Args:
        packed: uint8 (L, packed_bytes(count, width)).
        count: the number of integers in each row.
        width: the number of bits, 0 to 32.

    Returns:
        The integers (L, count), uint8 for widths up to 8 and int64 beyond.

    Raises:
        ValueError: if the rows have another length.
    """
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
    """Return the steps in which eight codes, one per byte of a word, are moved next to each other.

    The steps join pairs, then fours, then all eight. A step is (the distance in bits between the
    halves before it, the distance after it, a mask of the low halves, the factor by which it
    changes a high half).
    """
    steps = []
    for apart in (8, 16, 32):
        together = apart * width // 8
        mask = sum((1 << together) - 1 << place for place in range(0, 64, 2 * apart))
        steps.append((apart, together, mask, (1 << apart) - (1 << together)))
    return tuple(steps)
