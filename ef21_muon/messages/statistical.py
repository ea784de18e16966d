"""A value format whose levels are means of the values themselves."""

import torch
from torch import Generator, Tensor

from ef21_muon.messages.scaled import Blockwise
from ef21_muon.messages.values import (
    AT_A_TIME,
    check_length,
    pack,
    packed_bytes,
    reinterpret,
    unpack,
)


class Statistical(Blockwise):
    """`bits`-bit bins around the mean, a value for its bin's mean: deterministic, biased.

    The quantiser of MuLoCo (arXiv:2505.23725) and SparseLoCo (arXiv:2508.15706). With B = 2^bits,
    c = x less the block's mean and sd its unbiased standard deviation,

        q = clamp(round(c / scale + B / 2), 0, B - 1),  scale = span sd / B

    (1 for an sd of 0), halves to even, and every bin becomes the mean of what is in it. A block, a
    message or a row, takes 4 (B + 1) bytes beside its codes: its mean, and the bins' as float32.
    What is lost is the sum of squares within bins, at most ||x||^2: omega = 1, and alpha = 0 where
    it is multiplied by 1 - omega. That is reached: two values of a block share a bin. Normal values
    lose 0.18, 0.012 and 0.0003 of their squares for 2, 4 and 8 bits. Raises ValueError for other
    bits and blocks, and for a span of 0 or less.
    """

    unbiased = False

    def __init__(self, bits: int = 4, block: str = "message", span: float = 6.0):
        if not (type(bits) is int and 2 <= bits <= 8):
            raise ValueError(f"statistical got bits={bits}: give 2 to 8")
        if block not in ("row", "message"):
            raise ValueError(f"statistical got block={block}: give row or message")
        if not (isinstance(span, float | int) and 0 < span < float("inf")):
            raise ValueError(f"statistical got span={span}: give a number above 0")
        self.width, self.bins, self.span = bits, 2**bits, span
        super().__init__(block)

    def __str__(self) -> str:
        return f"statistical{self.width}{'' if self.block == 'message' else '@row'}"

    def omega(self, rows: int, columns: int) -> float:
        return 1.0

    def payload_bytes(self, rows: int, columns: int) -> int:
        means = 4 * self.blocks(rows, columns)[0] * (self.bins + 1)
        return means + packed_bytes(rows * columns, self.width)

    def encode(self, values: Tensor, generator: Generator | None = None) -> Tensor:
        blocks, length = self.blocks(*values.shape[1:])
        x = values.reshape(len(values), blocks, length)
        mean = x.mean(2, keepdim=True)
        unit = x - mean
        power = _power_below(unit.abs().amax(2, keepdim=True))
        unit /= power
        deviation = unit.var(2, keepdim=True, correction=min(1, length - 1)).sqrt_()
        scale = deviation.mul_(self.span / self.bins)
        scale.masked_fill_(scale == 0, 1)
        steps = (unit / scale).add_(self.bins // 2).round_()
        codes = steps.clamp_(0, self.bins - 1).to(torch.uint8)
        told = torch.cat([mean, self._means(unit, codes) * power], 2).flatten(1)
        return torch.cat([told.view(torch.uint8), pack(codes.flatten(1), self.width)], 1)

    def _means(self, unit: Tensor, codes: Tensor) -> Tensor:
        """Of what has a code, 0 where nothing has: (L, blocks, bins).

        unit: (L, blocks, length), magnitudes of at most 4, which are added up as integers: in any
        order of threads to the same bits.
        """
        one = 2.0 ** (60 - unit.shape[2].bit_length())
        sums = torch.zeros(*unit.shape[:2], self.bins, dtype=torch.int64, device=unit.device)
        counts = torch.zeros_like(sums)
        size = max(1, AT_A_TIME[unit.device.type] // (unit.shape[0] * unit.shape[1]))
        add = add_by_bins if unit.is_cuda and self.bins <= 16 else add_by_places
        for part, of_part in zip(unit.split(size, 2), codes.split(size, 2), strict=True):
            add(sums, counts, (part * one).to(torch.int64), of_part)
        return (sums.double() / counts.clamp_min_(1)).div_(one).float()

    def decode(self, payload: Tensor, rows: int, columns: int) -> Tensor:
        check_length(payload, self.payload_bytes(rows, columns), self, rows, columns)
        blocks, length = self.blocks(rows, columns)
        split = 4 * blocks * (self.bins + 1)
        told = reinterpret(payload[:, :split], torch.float32).view(-1, blocks, self.bins + 1)
        codes = unpack(payload[:, split:], rows * columns, self.width)
        places = codes.view(-1, blocks, length).to(torch.int64)
        values = (told[..., 1:] + told[..., :1]).gather(2, places)
        return values.view(-1, rows, columns)


def add_by_places(sums: Tensor, counts: Tensor, values: Tensor, codes: Tensor) -> None:
    """Add int64 values (L, blocks, n) to the sums of their bins (L, blocks, bins), and count them.

    What is not finite has any code.
    """
    places = codes.to(torch.int64) & sums.shape[2] - 1
    sums.scatter_add_(2, places, values)
    counts.scatter_add_(2, places, torch.ones_like(places))


def add_by_bins(sums: Tensor, counts: Tensor, values: Tensor, codes: Tensor) -> None:
    """The same, bin after bin: on a GPU all threads would wait to add to the same few numbers."""
    places = codes & sums.shape[2] - 1
    for number in range(sums.shape[2]):
        chosen = places == number
        sums[..., number] += torch.where(chosen, values, 0).sum(2)
        counts[..., number] += chosen.sum(2)


def _power_below(magnitudes: Tensor) -> Tensor:
    """The largest power of two that is no larger, within 2^-100 and 2^126.

    Multiples of it have squares within float32's range, and are rounded as they were.
    """
    exponents = (magnitudes.view(torch.int32) >> 23).clamp_(27, 253)
    return (exponents << 23).view(torch.float32)
