"""Compressors: what of a matrix is kept, written in a value format (`ef21_muon.messages.values`).

C(x) is by definition decode(encode(x)), so the bytes that are logged are the bytes that are sent.
Matrices come in batches (L, m, n); every one is a message of its own, of a size that follows from
the shape alone. All are contractive in the Frobenius norm, E ||C(x) - x||^2 <= (1 - alpha) ||x||^2
with the `alpha` that they document, where omega is that of the value format.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from ef21_muon.messages.levels import Normal, Statistical
from ef21_muon.messages.scaled import Integer, NaturalWindow, SignScale, SmoothnessAware
from ef21_muon.messages.values import BFloat16, Codec, Float32, Natural, Values

NAMES = (
    "float32, bfloat16, natural, natural3 to natural7, int2 to int8, normal1 to normal6, sign, "
    "smooth2 to smooth8, statistical2 to statistical8"
)
FORMATS = {"float32": Float32, "bfloat16": BFloat16, "natural": Natural, "sign": SignScale}
OF_BITS = {
    **{"natural": NaturalWindow, "int": Integer, "normal": Normal},
    **{"smooth": SmoothnessAware, "statistical": Statistical},
}


def value_format(values: Values | str | Mapping) -> Values:
    """A format from what configurations write, or the format itself; ValueError for anything else.

    A name, with bits behind it and a block behind @ ("natural4", "int4@128", "int4@8blocks",
    "sign@message"), or such a `format` with options ({format: natural4, stochastic: false}).
    """
    if isinstance(values, Values):
        return values
    options = dict(values) if isinstance(values, Mapping) else {"format": values}
    name = str(options.pop("format", None))
    match = re.fullmatch(rf"({'|'.join(FORMATS | OF_BITS)})(\d?)(?:@(\w+))?", name)
    kind, bits, block = match.groups() if match else (None, "", None)
    format_ = (OF_BITS if bits else FORMATS).get(kind)
    if format_ is None:
        raise ValueError(f"values={name} is not a value format: choose from {NAMES}")
    if block:
        options["block"] = int(block) if block.isdigit() else block
    try:
        return format_(*map(int, bits), **options)
    except TypeError:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"values={name} does not take {given}: choose from {NAMES}") from None


class Compressor(Codec):
    """Keeps part of a matrix and writes it in the format `values`."""

    lossless = False  # whether C(x) = x, bit for bit
    sends_all = False

    def __init__(self, values: Values | str = "float32"):
        self.values = value_format(values)

    def alpha(self, m: int, n: int) -> float:
        """The contraction that is guaranteed for m x n matrices."""
        raise NotImplementedError

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor | None:
        """Which entries were sent, even if rounded to 0: bool (L, m, n), or None for all."""
        if not self.sends_all:
            raise NotImplementedError

    def sample(self, m: int, n: int) -> Tensor:
        """A message for one matrix, on the CPU, of the same bits on all processors."""
        return self.encode(numbers(1, m, n, below=8), fixed_generator())

    def fit(self, m: int, n: int) -> "Compressor":
        """The compressor to use for m x n matrices: dense where this one would save no byte."""
        saves = self.payload_bytes(m, n) < self.values.payload_bytes(m, n)
        return self if saves or isinstance(self, Dense) else Dense(self.values)

    def title(self) -> str:
        """What is kept, as figures and tables name it."""
        raise NotImplementedError

    def __str__(self) -> str:
        """As figures and tables name it: "rank 15% natural"; float32 goes without saying."""
        return self.title() + ("" if isinstance(self.values, Float32) else f" {self.values}")


class Dense(Compressor):
    """Every entry is kept; alpha = 1 - omega. `Dense("natural")` is the Natural compressor."""

    sends_all = True
    lossless = property(lambda self: isinstance(self.values, Float32))

    def title(self) -> str:
        return "identity" if self.lossless else "dense"

    def payload_bytes(self, m: int, n: int) -> int:
        return self.values.payload_bytes(m, n)

    def alpha(self, m: int, n: int) -> float:
        return 1 - self.values.omega(m, n)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        return self.values.encode(x, generator)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        return self.values.decode(payload, m, n)


class Identity(Dense):
    """No compression: every entry as float32, alpha = 1."""

    def __init__(self):
        super().__init__(Float32())


def require_marks(compressor: Compressor, m: int, n: int) -> None:
    """Raise ValueError for a compressor that does not say which entries its messages have."""
    try:
        compressor.sent(torch.empty(0, compressor.payload_bytes(m, n), dtype=torch.uint8), m, n)
    except NotImplementedError:
        raise ValueError(
            f"mean='senders' is not allowed with w2s={compressor}, which does not say which "
            "entries a message has: give its class the method `sent`, or mean='all'"
        ) from None


def add_mean_over_senders(
    compressor: Compressor, total: Tensor, messages: Sequence[Tensor]
) -> bool:
    """Add to every entry of total (layers, m, n) the mean over the messages that have it.

    False, and nothing is added, where all have all entries.
    """
    shape = total.shape[1:]
    senders, received = torch.zeros_like(total), torch.zeros_like(total)
    for message in messages:
        sent = compressor.sent(message, *shape)
        if sent is None:
            return False
        senders += sent
        received += compressor.decode(message, *shape)
    total += received.div_(senders.clamp_(min=1))
    return True


def fixed_generator() -> Generator:
    """Of the CPU, in the same state each time."""
    return Generator("cpu").manual_seed(0)


def numbers(*shape: int, below: int = 1 << 23) -> Tensor:
    """Pseudo-random whole numbers from -below up to below, float32 on the CPU, on any machine.

    Sums of small ones are exact in any order; those below 2^23 fill a mantissa.
    """
    options = {"generator": fixed_generator(), "dtype": torch.float32, "device": "cpu"}
    return torch.randint(-below, below, shape, **options)
