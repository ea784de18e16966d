"""The base class of compressors, and the compressors that keep every entry.

A compressor maps a matrix to a message and back, C(x) = decode(encode(x)), so the bytes that are
logged are the bytes that are sent. Matrices come in batches (L, m, n), and each becomes a message
whose size depends on m and n alone. All compressors are contractive in the Frobenius norm,
E ||C(x) - x||^2 <= (1 - alpha) ||x||^2, with the `alpha` that they document; omega is that of the
value format (`ef21_muon.values`).
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
    """The base class of compressors, which keep part of a matrix and write it in a value format.

    Subclasses implement `payload_bytes(m, n)`, `encode(x, generator)`, `decode(payload, m, n)`,
    `alpha(m, n)` and `title()`. They set `sends_all = True`, or implement `sent`, if the optimizer
    averages over the workers that have sent an entry. In the library they also have a `spec`: the
    name in specs, followed by the arguments in their order.

    Args:
        values: the value format of the numbers that are sent, an object of `ef21_muon.values` or
            its spec, such as "natural" or "int4@128"; default "float32".

    Attributes:
        lossless: whether C(x) = x, bit for bit.
        sends_all: whether every message has all entries.

    Raises:
        ValueError: if `values` is not a value format.

    Example:
        >>> class FirstRow(Compressor):
        ...     def payload_bytes(self, m, n):
        ...         return self.values.payload_bytes(1, n)
        ...     def encode(self, x, generator=None):
        ...         return self.values.encode(x[:, :1], generator)
        ...     def decode(self, payload, m, n):
        ...         row = self.values.decode(payload, 1, n)
        ...         return torch.nn.functional.pad(row, (0, 0, 0, m - 1))
        >>> FirstRow("bfloat16").payload_bytes(8, 10)
        20
    """

    spec: tuple[str, ...] = ()  # the name in specs, and the arguments in their order
    lossless = False  # whether C(x) = x, bit for bit
    sends_all = False

    def __init__(self, values: ValueFormat | str = "float32"):
        self.values = value_format(values)

    def alpha(self, m: int, n: int) -> float:
        """Return the contraction that is guaranteed for m x n matrices, at most 1.

        A value of 0 or below guarantees nothing.
        """
        raise NotImplementedError

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor | None:
        """Return the marks of the entries that were sent, even if rounded to 0.

        Args:
            payload: messages, uint8 (L, payload_bytes(m, n)).
            m: the number of rows.
            n: the number of columns.

        Returns:
            bool (L, m, n), or None if every message has all entries.

        Raises:
            NotImplementedError: if the class does not implement it; mean="senders" needs it.
        """
        if self.sends_all:
            return None
        raise NotImplementedError

    def sample(self, m: int, n: int) -> Tensor:
        """Return a message for one m x n matrix, on the CPU, with the same bits on all processors.

        Ranks decode it when the optimizer is built, to find out whether they compute the same bits.
        """
        return self.encode(numbers(1, m, n, below=8), fixed_generator())

    def fit(self, m: int, n: int) -> "Compressor":
        """Return the compressor to use for m x n matrices.

        That is this one, or `Quantize` in the same value format if this one would save no byte.
        """
        saves = self.payload_bytes(m, n) < self.values.payload_bytes(m, n)
        return self if saves or isinstance(self, Quantize) else Quantize(self.values)

    def title(self) -> str:
        """Return the name for figures and tables, without the value format: "rank 15%"."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return the spec, from which `from_spec` builds an equal compressor: "rank:0.15:natural".

        A class without a spec of its own shows its attributes instead.
        """
        if "spec" not in vars(type(self)):  # a class that is not of this library
            own = (f"{key}={value!r}" for key, value in vars(self).items())
            return f"{type(self).__name__}({', '.join(own)})"
        name, *parameters = self.spec
        taken = signature(type(self)).parameters
        given = [(repr(getattr(self, one)), taken[one].default) for one in parameters]
        while given and given[-1][0] == str(given[-1][1]):
            given.pop()
        return ":".join([name, *(text for text, _ in given if text != "None")])

    def __str__(self) -> str:
        """Return the name for figures and tables: "rank 15% natural"; float32 is left out."""
        return self.title() + ("" if isinstance(self.values, Float32) else f" {self.values}")


class Quantize(Compressor):
    """Every entry, in a value format: C(x) = decode(encode(x)), alpha = 1 - omega.

    `Quantize("natural")` is natural compression and `Quantize("sign")` scaled signs; their specs
    are "natural" and "sign", those of other formats "quantize:int4" and so on.

    Args:
        values: the value format of the entries, an object of `ef21_muon.values` or its spec;
            default "float32", which loses nothing.

    Raises:
        ValueError: if `values` is not a value format.

    Example:
        >>> Quantize("normal2").payload_bytes(768, 768)  # of 2359296 bytes in float32
        148992
    """

    spec: tuple[str, ...] = ("quantize", "values")
    sends_all = True
    lossless = property(lambda self: isinstance(self.values, Float32))

    def title(self) -> str:
        return "quantize"

    def __repr__(self) -> str:
        if self.lossless:
            return "identity"
        named = isinstance(self.values, Natural | SignScale)  # the format's name is the spec
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
    """No compression: C(x) = x, every entry in float32, alpha = 1.

    Example:
        >>> Identity().payload_bytes(768, 768)
        2359296
    """

    spec = ("identity",)

    def __init__(self):
        super().__init__(Float32())


def require_marks(compressor: Compressor, m: int, n: int) -> None:
    """Raise ValueError for a compressor that does not implement `sent`."""
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
    """Add to each entry of `total` the mean over the messages that have this entry.

    Args:
        compressor: the compressor of the messages.
        total: float32 (layers, m, n), changed in place.
        messages: uint8 (layers, bytes), one per worker.

    Returns:
        Whether the mean was added; False, and nothing is added, if all messages have all entries.
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
    """Return a generator on the CPU that is in the same state each time."""
    return Generator("cpu").manual_seed(0)


def numbers(*shape: int, below: int = 1 << 23) -> Tensor:
    """Return pseudo-random whole numbers in [-below, below), float32, the same on any machine.

    Sums of small ones are exact in any order; those below 2^23 fill a mantissa.

    Args:
        shape: the shape of the tensor, on the CPU.
        below: the bound on magnitudes, default 2^23.
    """
    return torch.randint(
        -below, below, shape, generator=fixed_generator(), dtype=torch.float32, device="cpu"
    )
