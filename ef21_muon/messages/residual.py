"""Two compressors in one message: the second writes what the first has left."""

import torch
from torch import Generator, Tensor

from ef21_muon.messages.bits import check_length
from ef21_muon.messages.compressors import Compressor, Identity


class Residual(Compressor):
    """C(x) = C_1(x) + C_2(x - C_1(x)), as one message: that of `first`, then that of `second`.

    Horvath and Richtarik (arXiv:2006.11077, "induced compressor") take an unbiased C_2; for any
    two contractive ones, since C_2 meets the error of C_1 afresh,

        1 - alpha = (1 - alpha_1) (1 - alpha_2).

    A low-rank message and the signs of the rest keep a matrix's large directions exactly and its
    small ones roughly, which suits an LMO that gives all of them the same length. Raises ValueError
    for anything but two compressors.
    """

    def __init__(self, first: Compressor, second: Compressor):
        for name, given in (("first", first), ("second", second)):
            if not isinstance(given, Compressor):
                raise ValueError(f"Residual got {name}={given!r}: give a Compressor of ef21_muon")
        super().__init__(second.values)
        self.first, self.second = first, second

    def payload_bytes(self, m: int, n: int) -> int:
        return self.first.payload_bytes(m, n) + self.second.payload_bytes(m, n)

    def alpha(self, m: int, n: int) -> float:
        return 1 - (1 - self.first.alpha(m, n)) * (1 - self.second.alpha(m, n))

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        message = self.first.encode(x, generator)
        left = x - self.first.decode(message, *x.shape[1:])
        return torch.cat([message, self.second.encode(left, generator)], 1)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), f"{self} of a {m} x {n} matrix")
        split = self.first.payload_bytes(m, n)
        x = self.first.decode(payload[:, :split], m, n)
        return x.add_(self.second.decode(payload[:, split:], m, n))

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor | None:
        split = self.first.payload_bytes(m, n)
        first = self.first.sent(payload[:, :split], m, n)
        second = self.second.sent(payload[:, split:], m, n)
        return None if first is None or second is None else first | second

    def sample(self, m: int, n: int) -> Tensor:
        return torch.cat([self.first.sample(m, n), self.second.sample(m, n)], 1)

    def fit(self, m: int, n: int) -> Compressor:
        """Of both parts; the identity where they would save no byte."""
        fitted = Residual(self.first.fit(m, n), self.second.fit(m, n))
        whole = Identity()
        return fitted if fitted.payload_bytes(m, n) < whole.payload_bytes(m, n) else whole

    def __str__(self) -> str:
        return f"{self.first} + {self.second}"
