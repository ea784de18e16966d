"""Problems for the theory of EF21-Muon, whose constants are known, with proofs.

f = (1/n) sum_j f_j on m x k matrices; worker j has f_j. A geometry is the norm of the LMO; r is
min(m, k) and N is m k.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from ef21_muon.norms.lmo import Norm, Sign, Spectral
from scripts.theory.bounds import GeneralizedSmooth, LSmooth


@dataclass(frozen=True)
class Geometry:
    """A norm with exact LMO, and what converts entrywise constants into those of the norm.

    rho ||X|| <= ||X||_2 <= rho_bar ||X||. Let |u_ij| <= c |d_ij| and |v_ij| <= |g_ij| |d_ij|. Then
    ||u||_* <= c `scale` ||d|| and ||v||_* <= `stretch` ||g||_* ||d||.

    Spectral, with dual nuclear: rho = 1, rho_bar = sqrt(r), scale = r, stretch = sqrt(r), from
    ||u||_* <= sqrt(r) ||u||_2, ||d||_2 <= sqrt(r) ||d||, and ||v||_2 <= ||g||_2 max |d_ij| with
    max |d_ij| <= ||d||, ||g||_2 <= ||g||_*. Maximum of entries, with dual their absolute sum:
    rho = 1, rho_bar = sqrt(N), scale = N, stretch = 1.
    """

    norm: Norm
    rho: float
    rho_bar: float
    scale: float
    stretch: float


def geometry(name: str, m: int, k: int) -> Geometry:
    """ "spectral" or "max" for m x k matrices."""
    if name == "spectral":
        r = min(m, k)
        return Geometry(Spectral("svd", scaling="none"), 1.0, sqrt(r), r, sqrt(r))
    return Geometry(Sign(scaling="none"), 1.0, sqrt(m * k), m * k, 1.0)


@dataclass(frozen=True)
class Problem:
    """weights (n,) a_j > 0 and targets (n, m, k) B_j; X^0 = 0.

    A kind of problem has `slope`, the derivative of a function phi >= 0 with phi(0) = 0, and f_j(X)
    is a_j times the sum of phi over the entries of X - B_j, so that f_j^* = 0.
    """

    weights: Tensor
    targets: Tensor

    @property
    def start(self) -> Tensor:
        return torch.zeros(self.targets.shape[1:])

    @property
    def centre(self) -> Tensor:
        """The mean of the B_j with weights a_j, (m, k)."""
        return self.mean(self.targets) / self.weights.mean()

    def mean(self, of_workers: Tensor) -> Tensor:
        """The mean over j of a_j times what worker j has, (n, ...)."""
        return torch.einsum("j,j...->...", self.weights / len(self.weights), of_workers)

    def gradients(self, points: Tensor) -> Tensor:
        """grad f_j at points (..., m, k) for every j: (n, ..., m, k)."""
        return torch.einsum("j,j...->j...", self.weights, self.slope(self.differences(points)))

    def differences(self, points: Tensor) -> Tensor:
        """X - B_j at points (..., m, k) for every j: (n, ..., m, k)."""
        return (points.unsqueeze(-3) - self.targets).movedim(-3, 0)

    def shared(self, geometry: Geometry) -> dict:
        """What both theorems need to know."""
        workers = len(self.weights)
        return {"rho": geometry.rho, "rho_bar": geometry.rho_bar, "workers": workers}


class Quadratic(Problem):
    """f_j(X) = a_j / 2 ||X - B_j||_2^2, so that L_j = a_j scale and L = mean_j a_j scale.

    f is a / 2 ||X - centre||_2^2 and a constant, a = mean_j a_j.
    """

    def slope(self, x: Tensor) -> Tensor:
        return x

    def theorem(self, geometry: Geometry, **others: float) -> LSmooth:
        """`others`: alpha_D, alpha_P, sigma."""
        mean = float(self.weights.mean())
        return LSmooth(
            L=mean * geometry.scale,
            L_bar=float(self.weights.square().mean().sqrt()) * geometry.scale,
            delta0=mean / 2 * float((self.start - self.centre).square().sum()),
            **self.shared(geometry),
            **others,
        )


class Rippled(Problem):
    """phi'(x) = x + sin(2 x |x|) / 4: (L^0, L^1)-smooth, not L-smooth, not convex.

    For d = |x - y|: |sin(2 x |x|) - sin(2 y |y|)| <= min(2, 2 d (2 |x| + d)) <= 4 d |x| +
    min(2, 2 d^2) <= d (4 |x| + 2), since ||x| x - |y| y| <= d (|x| + |y|). Hence

        |phi'(x) - phi'(y)| <= d (3/2 + |x|) <= d (7/4 + |phi'(x)|) for all x, y,

    as A4 asks for: (L^0, L^1) = (7/4, 1) for phi. (A4 is asked of all X and Y, so that with X at a
    minimiser no gradient may grow faster than linearly: cosh and ||.||^4 do not satisfy it.) But
    phi'' = 1 + |x| cos(2 x^2) is unbounded in both directions. phi' has the sign of x, so phi >= 0.

    f_j, in a geometry: L_j^0 = 7/4 a_j scale, L_j^1 = stretch. f: entrywise, with the mean a of the
    a_j, the centre c and h = mean_j a_j |B_j - c|, the mean over j of the above is at most
    d (3/2 a + mean_j a_j |x - B_j|) <= d (3/2 a + h + a |x - c|), and the derivative of f is at
    least a |x - c| - a / 4, so that L^0 = (7/4 a + max h) scale and L^1 = stretch.

    f(X^0) and f^*, sums over entries, are integrals of phi' by the trapezoidal rule and minima over
    a grid; an entry's minimiser lies between the targets.
    """

    GRID = 1e-3

    def slope(self, x: Tensor) -> Tensor:
        return x + (2 * x * x.abs()).sin() / 4

    def values(self, points: Tensor) -> Tensor:
        """The share of every entry in f, at points (..., m, k)."""
        places = torch.arange(0, float(self.targets.abs().max()) * 2 + 1, self.GRID).double()
        steps = torch.cumulative_trapezoid(self.slope(places), places)
        phi = np.interp(self.differences(points).abs(), places[1:], steps)
        return self.mean(torch.from_numpy(phi))

    def theorem(self, geometry: Geometry, **others: float) -> GeneralizedSmooth:
        """`others`: alpha_D, sigma."""
        low, high = self.targets.aminmax()
        grid = torch.arange(float(low), float(high) + self.GRID, self.GRID).double()
        grid = grid[:, None, None].expand(-1, *self.start.shape)
        least = float(self.values(grid).amin(0).sum())
        smooth = 7 / 4 * float(self.weights.mean())
        return GeneralizedSmooth(
            L0=(smooth + float(self.mean(self.differences(self.centre).abs()).max()))
            * geometry.scale,
            L1=geometry.stretch,
            L0_bar=smooth * geometry.scale,
            L1_max=geometry.stretch,
            dissimilarity=geometry.stretch**2 * least,
            delta0=float(self.values(self.start).sum()) - least,
            **self.shared(geometry),
            **others,
        )


class Pulling:
    """Three workers whose largest gradient entries point uphill (Beznosikov et al., 2002.12410).

    f_j(x) = <v_j, x>^2 + ||x||^2 / 4 on (3, 1) matrices, with v_1 = (-3, 2, 2) and its rotations.
    At x = t (1, 1, 1) the gradients are t (-11/2, 9/2, 9/2) and rotations, so that gradient descent
    with step gamma on the largest entry of each multiplies x by 1 + 11 gamma / 6. The minimum is 0.
    """

    start = torch.ones(3, 1)
    vectors = torch.tensor([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]]).double()

    def gradients(self, points: Tensor) -> Tensor:
        """grad f_j at points (..., 3, 1) for every j: (3, ..., 3, 1)."""
        along = torch.einsum("ji,...iu->j...u", self.vectors, points.double())
        return 2 * torch.einsum("j...u,ji->j...iu", along, self.vectors) + points / 2
