"""Compressors: what of a matrix is kept, written in a value format (`ef21_muon.values.base`).

C(x) is by definition decode(encode(x)), so the bytes that are logged are the bytes that are sent.
Matrices come in batches (L, m, n); every one is a message of its own, of a size that follows from
the shape alone. All are contractive in the Frobenius norm, E ||C(x) - x||^2 <= (1 - alpha) ||x||^2
with the `alpha` that they document, where omega is that of the value format.
"""

import hashlib
from collections.abc import Sequence
from inspect import signature

import torch
from torch import Generator, Tensor

from ef21_muon.values.base import Codec, Float32, Natural, ValueFormat
from ef21_muon.values.scaled import SignScale
from ef21_muon.values.specs import value_format


class Compressor(Codec):
    """Keeps part of a matrix and writes it in the format `values`."""

    spec: tuple[str, ...] = ()  # its name in specs, and its arguments in their order
    lossless = False  # whether C(x) = x, bit for bit
    sends_all = False

    def __init__(self, values: ValueFormat | str = "float32"):
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
        """The compressor to use for m x n matrices: Quantize where this one would save no byte."""
        saves = self.payload_bytes(m, n) < self.values.payload_bytes(m, n)
        return self if saves or isinstance(self, Quantize) else Quantize(self.values)

    def title(self) -> str:
        """What is kept, as figures and tables name it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """The spec that it is built from (`compressors.from_spec`): "rank:0.15:natural"."""
        if "spec" not in vars(type(self)):  # of somebody else's class
            own = (f"{key}={value!r}" for key, value in vars(self).items())
            return f"{type(self).__name__}({', '.join(own)})"
        name, *parameters = self.spec
        taken = signature(type(self)).parameters
        given = [(repr(getattr(self, one)), taken[one].default) for one in parameters]
        while given and given[-1][0] == str(given[-1][1]):
            given.pop()
        return ":".join([name, *(text for text, _ in given if text != "None")])

    def __str__(self) -> str:
        """As figures and tables name it: "rank 15% natural"; float32 goes without saying."""
        return self.title() + ("" if isinstance(self.values, Float32) else f" {self.values}")


class Quantize(Compressor):
    """Every entry is kept; alpha = 1 - omega. `Quantize("natural")` is the Natural compressor."""

    spec = ("quantize", "values")
    sends_all = True
    lossless = property(lambda self: isinstance(self.values, Float32))

    def title(self) -> str:
        return "quantize"

    def __repr__(self) -> str:
        if self.lossless:
            return "identity"
        named = isinstance(self.values, Natural | SignScale)  # which need no other word
        return str(self.values) if named else super().__repr__()

    def __str__(self) -> str:
        return repr(self).replace("quantize:", "quantize ")

    def payload_bytes(self, m: int, n: int) -> int:
        return self.values.payload_bytes(m, n)

    def alpha(self, m: int, n: int) -> float:
        return 1 - self.values.omega(m, n)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        return self.values.encode(x, generator)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        return self.values.decode(payload, m, n)


class Identity(Quantize):
    """No compression: every entry as float32, alpha = 1."""

    spec = ("identity",)

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


def new_generator(device: torch.device, seed: int, stream: int, purpose: str) -> Generator:
    """A generator of random numbers that no other stream and purpose has.

    Args:
        device: of the numbers; the meta device has none, and gets the CPU's.
        seed: of the run.
        stream: number of the rank.
        purpose: what the numbers are for.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{purpose}".encode()).digest()
    device = torch.device("cpu") if device.type == "meta" else device
    return Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def fixed_generator() -> Generator:
    """Of the CPU, in the same state each time."""
    return Generator("cpu").manual_seed(0)


def numbers(*shape: int, below: int = 1 << 23) -> Tensor:
    """Pseudo-random whole numbers from -below up to below, float32 on the CPU, on any machine.

    Sums of small ones are exact in any order; those below 2^23 fill a mantissa.
    """
    options = {"generator": fixed_generator(), "dtype": torch.float32, "device": "cpu"}
    return torch.randint(-below, below, shape, **options)
