"""How a kept number is written: the value formats that every compressor can use.

A format turns rows of float32 numbers (L, k) into rows of bytes (L, payload_bytes(k)) and back.
It documents its bits a value and its `omega`: E ||decode(encode(v)) - v||^2 <= omega ||v||^2.
"""

import torch
from torch import Generator, Tensor

from ef21_muon.bits import check_length, pack, packed_bytes, unpack


class Values:
    """A value format. `unbiased` formats have E decode(encode(v)) = v."""

    omega: float
    unbiased: bool

    def payload_bytes(self, count: int) -> int:
        """Bytes that `count` values take."""
        raise NotImplementedError

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        """values: float32 (L, k) -> uint8 (L, payload_bytes(k)).

        `generator` drives stochastic rounding; None is torch's global generator.
        """
        raise NotImplementedError

    def decode(self, payload: Tensor, count: int) -> Tensor:
        """uint8 (L, payload_bytes(count)) -> float32 (L, count); ValueError on another length."""
        raise NotImplementedError


class Float32(Values):
    """32 bits a value, exact."""

    omega = 0.0
    unbiased = True

    def payload_bytes(self, count: int) -> int:
        return 4 * count

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        return values.contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, count: int) -> Tensor:
        return _reinterpret(payload, torch.float32, count)


class BFloat16(Values):
    """16 bits a value, rounded to nearest: a relative error of at most 2^-8, deterministic.

    Magnitudes below float32's normal range (2^-126) lose more.
    """

    omega = 2.0**-16
    unbiased = False

    def payload_bytes(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        return values.to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, payload: Tensor, count: int) -> Tensor:
        return _reinterpret(payload, torch.bfloat16, count).float()


class Natural(Values):
    """Sign and power-of-two exponent, 9 bits a value (Horvath et al., arXiv:1905.10988).

    |v| in [2^e, 2^(e+1)] becomes 2^(e+1) with probability |v| 2^-e - 1, else 2^e: unbiased with
    omega = 1/8. Below 2^-126 it rounds to 0 or 2^-126, still unbiased; above 2^127 it may round to
    infinity. `stochastic=False` rounds to the nearer power: deterministic, biased, omega = 1/9.
    """

    def __init__(self, stochastic: bool = True):
        self.stochastic = self.unbiased = stochastic
        self.omega = 1 / 8 if stochastic else 1 / 9

    def payload_bytes(self, count: int) -> int:
        return count + packed_bytes(count, 1)

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        # A float32 is a sign, 8 bits of exponent e and 23 of mantissa f, |v| = 2^e (1 + f): adding
        # a uniform 23-bit number to the mantissa carries into the exponent with probability f.
        bits = values.contiguous().view(torch.int32)
        if self.stochastic:
            rounded = torch.randint(
                1 << 23, bits.shape, generator=generator, dtype=torch.int32, device=bits.device
            ).add_(bits)
        else:
            rounded = bits + (1 << 22)
        exponent = (rounded >> 23).to(torch.uint8)
        return torch.cat([exponent, pack((bits < 0).to(torch.uint8), 1)], 1)

    def decode(self, payload: Tensor, count: int) -> Tensor:
        check_length(payload, self.payload_bytes(count), f"{count} natural values")
        bits = payload[:, :count].to(torch.int32) << 23
        bits |= unpack(payload[:, count:], count, 1).to(torch.int32) << 31
        return bits.view(torch.float32)


FORMATS = {"float32": Float32, "bfloat16": BFloat16, "natural": Natural}


def value_format(values: Values | str) -> Values:
    """A format from its name, as configurations write it; a format is returned as it is."""
    if isinstance(values, Values):
        return values
    if values not in FORMATS:
        raise ValueError(
            f"values={values!r} is not a value format: choose from {', '.join(FORMATS)}"
        )
    return FORMATS[values]()


def _reinterpret(payload: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Bytes (L, itemsize * count), at any offset of a larger buffer, read as (L, count) numbers."""
    check_length(payload, dtype.itemsize * count, f"{count} values of {dtype}")
    return payload.clone(memory_format=torch.contiguous_format).view(dtype)
