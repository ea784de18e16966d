"""The rarer compressors of the paper: contractive in other norms, or by way of another compressor.

The theory takes the contraction of C_j (w2s) in the dual norm or the Euclidean one and that of C
(s2w) in the norm itself (arXiv:2510.00643). `alpha` is the Frobenius one, as everywhere; classes
document the others, for float32 values.
"""

from copy import copy
from math import sqrt

import torch
from torch import Generator, Tensor

from ef21_muon.compressors.base import Compressor
from ef21_muon.compressors.indices import index_bytes, pack_indices, unpack_indices
from ef21_muon.compressors.low_rank import QuantizedRank, RankK
from ef21_muon.compressors.selection import largest
from ef21_muon.compressors.sparse import Entries, Fraction
from ef21_muon.norms.newton_schulz import unit_largest
from ef21_muon.values.base import Float32, check, check_length, check_share


class TopSingular(RankK):
    """The K largest singular triplets by an exact SVD, K = fraction min(m, n), as factors.

    P holds the singular vectors of the shorter side and Q = P^T x. Of r = min(m, n) singular values
    it drops the r - K smallest, so in the Schatten-p norm

        1 - alpha = (1 - K / r)^(2/p):  K / r for Frobenius, 1 - (1 - K / r)^2 for nuclear,

    and alpha = 0 in the spectral norm (p = infinity). No message of its rank has a smaller error in
    any of these norms (Eckart and Young; Mirsky). On a CPU the SVD takes 5 to 20 times as long as
    RankK's sketch.
    """

    kind = "singular"
    spec = ("top_singular", "fraction", "values")

    def _basis(self, x: Tensor, r: int, generator: Generator | None) -> Tensor:
        # The SVD of numbers that are not finite raises; in Q they stay, for the receiver to see.
        return torch.linalg.svd(unit_largest(x).nan_to_num_(), full_matrices=False).U[..., :r]


class TopColumns(Fraction, Entries):
    """The k columns of largest 2-norm, k = fraction n, their places as Elias-Fano coded indices.

    A column of a weight (d_out, d_in) belongs to one input. alpha = (1 - omega) k / n, and in the
    mixed norm ||x||_{2,q} = (sum_j ||x_j||_2^q)^(1/q) of columns x_j, q >= 1, for float32 values

        1 - alpha = (1 - k / n)^(2/q).
    """

    kind = "top columns"
    spec = ("top_columns", "fraction", "values")

    def alpha(self, m: int, n: int) -> float:
        k = self.kept(n)
        return (1 - self.values.omega(k, m)) * k / n

    def _layout(self, m: int, n: int) -> tuple[int, int, int]:
        k = self.kept(n)
        return index_bytes(n, k), k, m

    def _positions(self, places: Tensor, m: int, n: int) -> Tensor:
        columns = unpack_indices(places, n, self.kept(n))
        starts = torch.arange(0, m * n, n, device=places.device)
        return (columns[:, :, None] + starts).flatten(1)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        m, n = x.shape[1:]
        columns = largest(torch.linalg.vector_norm(unit_largest(x), dim=1), self.kept(n))
        kept = x.gather(2, columns[:, None].expand(-1, m, -1)).mT
        return torch.cat([pack_indices(columns, n), self.values.encode(kept, generator)], 1)


class Modified(Compressor):
    """A compressor that changes what another one does, and is fitted where that one is."""

    def __init__(self, compressor: Compressor):
        given = f"{type(self).__name__} got compressor={compressor!r}"
        check(isinstance(compressor, Compressor), given, "a Compressor of ef21_muon")
        super().__init__(compressor.values)
        self.compressor = compressor

    def payload_bytes(self, m: int, n: int) -> int:
        return self.compressor.payload_bytes(m, n)

    def sample(self, m: int, n: int) -> Tensor:
        return self.compressor.sample(m, n)

    def fit(self, m: int, n: int) -> Compressor:
        fitted = copy(self)
        fitted.compressor = self.compressor.fit(m, n)
        return fitted

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor | None:
        return self.compressor.sent(payload, m, n)


class Scaled(Modified):
    """C(x) = scale * compressor(x), scale in (0, 1]: the same message, and decoding multiplies.

    It makes unbiased formats of few bits contractive: of a compressor that keeps the share c of
    ||x||^2, and whose alpha is (1 - omega) c,

        alpha = c (2 scale - scale^2 (1 + omega)),

    which is largest, c / (1 + omega), for scale = 1 / (1 + omega), the default. For biased values
    the scale has to be given, and 1 - alpha = (scale sqrt(1 - a) + 1 - scale)^2 for the
    compressor's own alpha a, in every norm in which it has one.
    """

    spec = ("scaled", "scale", "compressor")

    def __init__(self, compressor: Compressor, scale: float | None = None):
        super().__init__(compressor)
        if isinstance(compressor, Modified):
            raise ValueError(f"Scaled got compressor={compressor}: scale the one inside it instead")
        if scale is None and (not self.values.unbiased or isinstance(compressor, QuantizedRank)):
            raise ValueError(f"Scaled has no default scale for {compressor}: give one")
        if scale is not None:
            check_share("Scaled got scale", scale)
        self.scale = scale

    def title(self) -> str:
        by = "" if self.scale is None else f" {self.scale:.4g}"
        return f"scaled{by} {self.compressor.title()}"

    def alpha(self, m: int, n: int) -> float:
        scale = self._scale(m, n)
        if self.values.unbiased:
            share, omega = self._share_and_omega(m, n)
            return share * (2 * scale - scale**2 * (1 + omega))
        return 1 - (scale * sqrt(1 - self.compressor.alpha(m, n)) + 1 - scale) ** 2

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        return self.compressor.encode(x, generator)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        return self.compressor.decode(payload, m, n).mul_(self._scale(m, n))

    def _scale(self, m: int, n: int) -> float:
        return self.scale or 1 / (1 + self._share_and_omega(m, n)[1])

    def _share_and_omega(self, m: int, n: int) -> tuple[float, float]:
        """c and omega of a compressor with unbiased values, from alpha = (1 - omega) c."""
        exact = copy(self.compressor)
        exact.values = Float32()
        share = exact.alpha(m, n)
        return share, 1 - self.compressor.alpha(m, n) / share


class Bernoulli(Modified):
    """The compressor's message with `probability`, in (0, 1], else nothing, C(x) = 0.

    alpha = probability times the compressor's, in every norm. Every matrix is drawn for itself. It
    saves no bytes: one in front of a message says whether to read it.
    """

    spec = ("bernoulli", "probability", "compressor")

    def __init__(self, compressor: Compressor, probability: float = 0.5):
        super().__init__(compressor)
        check_share("Bernoulli got probability", probability)
        self.probability = probability

    def title(self) -> str:
        return f"sent {100 * self.probability:.4g}%, {self.compressor.title()}"

    def payload_bytes(self, m: int, n: int) -> int:
        return 1 + super().payload_bytes(m, n)

    def alpha(self, m: int, n: int) -> float:
        return self.probability * self.compressor.alpha(m, n)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        draws = torch.rand(len(x), 1, generator=generator, dtype=torch.float32, device=x.device)
        sent = (draws < self.probability).to(torch.uint8)
        return torch.cat([sent, self.compressor.encode(x, generator)], 1)

    def sample(self, m: int, n: int) -> Tensor:
        return torch.nn.functional.pad(super().sample(m, n), (1, 0), value=1)

    def decode(self, payload: Tensor, m: int, n: int) -> Tensor:
        check_length(payload, self.payload_bytes(m, n), self, m, n)
        x = self.compressor.decode(payload[:, 1:], m, n)
        return x.masked_fill_(payload[:, :1, None] == 0, 0)

    def sent(self, payload: Tensor, m: int, n: int) -> Tensor:
        came = (payload[:, :1, None] != 0).expand(-1, m, n)
        within = super().sent(payload[:, 1:], m, n)
        return came if within is None else came & within
