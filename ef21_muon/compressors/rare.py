"""The paper's rarer compressors: contractive in other norms, or built around another compressor.

The theory asks for contraction of C_j (w2s) in the dual norm or the Euclidean norm, and of C (s2w)
in the norm itself (arXiv:2510.00643). `alpha` is for the Frobenius norm, as everywhere. The classes
document the other norms, for float32 values.
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
    """The K largest singular triplets by an exact SVD, K = fraction min(m, n), as two factors.

        C(x) = P Q,  Q = P^T x,  P the singular vectors of the shorter side

    With r = min(m, n), it drops the r - K smallest singular values, so in the Schatten-p norm

        1 - alpha = (1 - K / r)^(2/p):  alpha = K / r for the Frobenius norm, p = 2,

    1 - (1 - K / r)^2 for the nuclear norm, p = 1, and 0 for the spectral norm, p = infinity. No
    other message of this rank has a smaller error in these norms (Eckart and Young; Mirsky). On a
    CPU the SVD takes 5 to 20 times as long as the sketch of `RankK`.

    Args:
        fraction: the part of the rank that is sent, in (0, 1].
        values: the value format of both factors, an object of `ef21_muon.values` or its spec;
            default "float32".

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> TopSingular(0.5).alpha(8, 8)
        0.5

    References:
        Gruntkowska et al. (arXiv:2510.00643).
    """

    kind = "singular"
    spec = ("top_singular", "fraction", "values")

    def _basis(self, x: Tensor, r: int, generator: Generator | None) -> Tensor:
        # The SVD of NaN or infinity would raise. Q keeps them, so the receiver sees them.
        return torch.linalg.svd(unit_largest(x).nan_to_num_(), full_matrices=False).U[..., :r]


class TopColumns(Fraction, Entries):
    """The columns of largest 2-norm, k = fraction n of n columns.

        alpha = (1 - omega) k / n,    and in the norm ||x||_{2,q}    1 - alpha = (1 - k / n)^(2/q)

    where omega is that of the value format and ||x||_{2,q} = (sum_j ||x_j||_2^q)^(1/q) with the
    columns x_j and q >= 1. A column of a weight (d_out, d_in) belongs to one input. The indices of
    the columns are Elias-Fano coded.

    Args:
        fraction: the part of the columns that is sent, in (0, 1].
        values: the value format of their entries, an object of `ef21_muon.values` or its spec;
            default "float32".

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> compressor = TopColumns(0.5)
        >>> compressor.decode(compressor.encode(torch.tensor([[[3.0, -1.0], [1.0, -2.0]]])), 2, 2)
        tensor([[[3., 0.],
                 [1., 0.]]])

    References:
        Gruntkowska et al. (arXiv:2510.00643).
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
    """The base class of compressors that change what another compressor does.

    Args:
        compressor: the other compressor, an object of `ef21_muon.compressors`; its `fit` applies.

    Raises:
        ValueError: if it is not a compressor.
    """

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
    """Another compressor times a factor, C(x) = scale compressor(x).

    The message is the same, and the decoder multiplies. For unbiased values and a compressor that
    keeps the part c of ||x||^2, so that its own alpha is (1 - omega) c,

        alpha = c (2 scale - scale^2 (1 + omega)),

    which is largest, c / (1 + omega), at scale = 1 / (1 + omega). So formats of few bits, whose
    omega is above 1, become contractive. For biased values

        1 - alpha = (scale sqrt(1 - a) + 1 - scale)^2

    with the compressor's own alpha a, in every norm in which it has one.

    Args:
        compressor: the compressor that is scaled, an object of `ef21_muon.compressors`.
        scale: the factor, in (0, 1]; default None, which is 1 / (1 + omega) and needs unbiased
            values.

    Raises:
        ValueError: if an argument is out of range, and if a scale is missing.

    Example:
        >>> Scaled(TopSingular(0.1, "int2"), 0.5)
        scaled:0.5:top_singular:0.1:int2

    References:
        Gruntkowska et al. (arXiv:2510.00643).
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
        self.scale = None if scale is None else float(scale)

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
        """Return the factor for m x n matrices."""
        return self.scale or 1 / (1 + self._share_and_omega(m, n)[1])

    def _share_and_omega(self, m: int, n: int) -> tuple[float, float]:
        """Return c and omega of a compressor with unbiased values, from alpha = (1 - omega) c."""
        exact = copy(self.compressor)
        exact.values = Float32()
        share = exact.alpha(m, n)
        return share, 1 - self.compressor.alpha(m, n) / share


class Bernoulli(Modified):
    """Another compressor's message with a probability, and otherwise nothing, C(x) = 0.

        alpha = probability times the compressor's alpha, in every norm

    Every matrix is drawn independently. This saves no bytes, as a message keeps its size: its first
    byte says whether the rest counts.

    Args:
        compressor: the compressor of the message, an object of `ef21_muon.compressors`.
        probability: the probability of a message, in (0, 1]; default 0.5.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> Bernoulli(RankK(0.5), 0.25).alpha(8, 8)
        0.125

    References:
        Gruntkowska et al. (arXiv:2510.00643).
    """

    spec = ("bernoulli", "probability", "compressor")

    def __init__(self, compressor: Compressor, probability: float = 0.5):
        super().__init__(compressor)
        check_share("Bernoulli got probability", probability)
        self.probability = float(probability)

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
