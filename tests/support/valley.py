"""A convex Lipschitz function on which Muon does not converge, and error feedback of its steps."""

from itertools import repeat

import torch

from ef21_muon.norms import Spectral
from scripts.theory.algorithm import descend


class Valley:
    """f(X) = |X_11 - X_22| + `slope` |X_11 + X_22| on 2 x 2 matrices: convex, Lipschitz, f^* = 0.

    The subgradients are diagonal, diag(+-slope + 1, +-slope - 1) or minus that, so their polar
    factor is +-diag(1, -1) if slope < 1, and no step of Muon without momentum, of whatever length,
    changes X_11 + X_22. With momentum M = diag(mu + nu, mu - nu), where mu is an average of
    +-slope and nu one of +-1 with weight beta on the newest, the same holds while |nu| > slope. If
    beta > 1/2, |nu| >= 2 beta - 1 whatever the signs, so for slope < 2 beta - 1 it holds for ever.

    That Muon does not converge on such functions is the result of Parshakova et al.
    (arXiv:2605.08980); this example and the repair were found from its abstract and Karimireddy et
    al. (arXiv:1901.09847), and are those of public code of that work.
    """

    start = torch.diag(torch.tensor([1.1, 0.9]))

    def __init__(self, slope):
        self.slope = slope

    def value(self, models):
        """f of (..., 2, 2)."""
        first, second = models[..., 0, 0], models[..., 1, 1]
        return (first - second).abs() + self.slope * (first + second).abs()

    def subgradient(self, models):
        """A subgradient at every one of (..., 2, 2)."""
        first, second = models[..., 0, 0], models[..., 1, 1]
        across = torch.where(first >= second, 1.0, -1.0)
        along = torch.where(first >= -second, self.slope, -self.slope)
        return torch.stack([along + across, along - across], -1).diag_embed()

    def muon(self, beta, radii, **options):
        """X^0, ..., X^K of Muon, (K + 1, 2, 2), with a radius for each round."""
        return descend(
            self.start[None],
            repeat(self.subgradient),
            lr=radii,
            momentum=1 - beta,
            norm=Spectral("svd", scaling="none"),
            **options,
        )[:, 0]
