"""Compressors: what of a matrix is kept, written in a value format (`ef21_muon.messages.values`).

A compressor is a codec. C(x) is by definition decode(encode(x)), so the bytes that are logged are
the bytes that are sent. Payload sizes follow from the shape alone. All are contractive,

    E ||C(x) - x||^2 <= (1 - alpha) ||x||^2,

with the `alpha` that they document (Frobenius norm), where omega is that of the value format.
Matrices come in batches (L, m, n); every matrix is a message of its own, a row of the payload.
"""

import torch
from torch import Generator, Tensor

from ef21_muon.messages.formats import value_format
from ef21_muon.messages.values import Float32, Values


class Compressor:
    """Keeps part of a matrix and writes it in the format `values`."""

    def __init__(self, values: Values | str = "float32"):
        self.values = value_format(values)

    @property
    def lossless(self) -> bool:
        """Whether C(x) = x, bit for bit."""
        return False

    def payload_bytes(self, m: int, n: int) -> int:
        """Bytes of the message for one m x n matrix."""
        raise NotImplementedError

    def alpha(self, m: int, n: int) -> float:
        """The contraction that is guaranteed for m x n matrices."""
        raise NotImplementedError

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """float32 (L, m, n) -> uint8 (L, payload_bytes(m, n)).

        `generator` drives what is random in it; None is torch's global generator.
        """
        raise NotImplementedError

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        """uint8 (L, payload_bytes(m, n)) -> float32 (L, m, n); ValueError on another length."""
        raise NotImplementedError

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor | None:
        """Which entries the messages have: bool (L, m, n), or None where they have all.

        An entry whose value was rounded to 0 was sent all the same.
        """
        raise NotImplementedError

    def sample(self, m: int, n: int) -> Tensor:
        """A message for one m x n matrix, uint8 (1, payload_bytes), alike on every machine.

        For the comparison of what machines decode it to: a compressor whose `encode` may come out
        otherwise on another processor even of small whole numbers, as by a product of matrices,
        makes it in another way. On the CPU.
        """
        return self.encode(numbers(1, m, n, below=8), fixed_generator())

    def fit(self, m: int, n: int) -> "Compressor":
        """The compressor to use for m x n matrices: dense where this one would save no byte."""
        dense = Dense(self.values)
        return self if self.payload_bytes(m, n) < dense.payload_bytes(m, n) else dense

    def title(self) -> str:
        """What is kept, as figures and tables name it."""
        raise NotImplementedError

    def __str__(self) -> str:
        """As figures and tables name it: "rank 15% natural"; float32 goes without saying."""
        exact = isinstance(self.values, Float32)
        return self.title() if exact else f"{self.title()} {self.values}"


class Dense(Compressor):
    """Every entry is kept; alpha = 1 - omega. `Dense("natural")` is the Natural compressor."""

    def title(self) -> str:
        return "identity" if self.lossless else "dense"

    @property
    def lossless(self) -> bool:
        return isinstance(self.values, Float32)

    def payload_bytes(self, m: int, n: int) -> int:
        return self.values.payload_bytes(m, n)

    def alpha(self, m: int, n: int) -> float:
        return 1 - self.values.omega(m, n)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        return self.values.encode(x, generator)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        return self.values.decode(payload, m, n)

    def sent(self, payload: Tensor, m: int, n: int) -> None:
        return None

    def fit(self, m: int, n: int) -> Compressor:
        return self


class Identity(Dense):
    """No compression: every entry as float32, alpha = 1."""

    def __init__(self):
        super().__init__(Float32())


def marked(positions: Tensor, total: int) -> Tensor:
    """int64 (L, k) -> bool (L, total), True at the positions."""
    marks = torch.zeros(len(positions), total, dtype=torch.bool, device=positions.device)
    return marks.scatter_(1, positions, True)


# Numbers that are alike on every machine, of which torch.randn draws others on some processors.


def fixed_generator() -> Generator:
    """Of the CPU, in the same state each time."""
    return Generator("cpu").manual_seed(0)


def numbers(*shape: int, below: int = 1 << 23) -> Tensor:
    """Pseudo-random whole numbers from -below up to below, float32 on the CPU.

    Of few digits, as below=8, sums are exact in any order; those of 24 fill a mantissa.
    """
    options = {"generator": fixed_generator(), "dtype": torch.float32, "device": "cpu"}
    return torch.randint(-below, below, shape, **options)
