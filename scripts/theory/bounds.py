"""The two theorems of EF21-Muon as numbers: parameters and bounds from a problem's constants.

Both are from the poster of "Error Feedback for Muon and Friends" (arXiv:2510.00643), which has them
without proofs. Its constants, with f = (1/n) sum_j f_j over n workers:

    rho ||X|| <= ||X||_2 <= rho_bar ||X||     the norm of the LMO and the Euclidean one (Frobenius),
                                              so that rho ||G||_2 <= ||G||_* <= rho_bar ||G||_2
    C_j in B_2(alpha_D), C in B(alpha_P)      E ||C_j(x) - x||_2^2 <= (1 - alpha_D) ||x||_2^2 of the
                                              workers, and C of the servers likewise in ||.||
    E ||grad f_j(X; xi) - grad f_j(X)||_2^2 <= sigma^2
    delta0 = f(X^0) - f^*

How the poster is read is in `results/theory/README.md`: sigma bounds the noise in the Euclidean
norm, so that a bound sigma_* in the dual norm gives sigma = sigma_* / rho, and the X^k of the first
theorem are those of the servers.
"""

from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class LSmooth:
    """Convergence under L-smoothness, for rounds K (A1, A3, A5).

    f is `L`-smooth, ||grad f(X) - grad f(Y)||_* <= L ||X - Y||, the f_j are L_j-smooth and `L_bar`
    = sqrt(mean_j L_j^2). X^0 = W^0 and G_j^0 = M_j^0 = grad f_j(X^0; xi_j^0): first_message="full"
    of `EF21Muon`. The step, t^k = gamma ||G^k||_*, is AdaptiveRadius(l0=1 / gamma, l1=0) with lr=1.

    From the poster: `beta`, `zeta`, `gamma` and the orders of `bound`. Derived, since the poster
    has O(.): what `bound` returns,

        (1/K) sum_{k<K} E ||grad f(X^k)||_*^2 <= 4 delta0 / (gamma K)
            + 24 rho_bar^2 sigma^2 [ (beta + 1 / (beta K)) / n
            + (1 - alpha_D) beta^2 / alpha_D + 2 c (beta^3 + beta / K) / alpha_D ],

    c = (1 - alpha_D) (1 + 2 / alpha_D), for every beta in (0, 1] with the poster's zeta and gamma.
    With sigma = 0 it is 4 delta0 / (gamma K).

    Derivation. Let r_k = ||X^{k+1} - X^k|| = gamma ||G^k||_*, e_k = ||grad f(X^k) - G^k||_* and
    |a|^2 = sum_k E a_k^2. As <G^k, X^{k+1} - X^k> = -gamma ||G^k||_*^2, smoothness and Young give

        f(X^{k+1}) <= f(X^k) - gamma/4 ||grad f(X^k)||_*^2 + 3 gamma/2 e_k^2
                      - (1 / (4 gamma) - L/2) r_k^2,

    and the last bracket is sqrt(zeta) / 2 >= gamma zeta. So (3/2) |e|^2 <= zeta |r|^2 + K N makes
    the mean of ||grad f(X^k)||_*^2 at most 4 delta0 / (gamma K) + 4 N. To get there:

    1. sqrt(E ||X^k - W^k||^2), first 0, gains r_k and shrinks by s = sqrt(1 - alpha_P) a round:
       |X - W| <= p |r| with p = s / (1 - s) <= 2 / alpha_P (Young's inequality for convolutions).
    2. M_j^k - grad f_j(X^k) = A_j^k + B_j^k, where B_j is the noise alone: B_j^0 = xi_j^0 and
       B_j^{k+1} = (1 - beta) B_j^k + beta xi_j^{k+1}, so that
       sum_k E ||mean_j B_j^k||_*^2 <= rho_bar^2 sigma^2 (beta K + 1 / beta) / n.
       The rest: |A_j| <= L_j a |r| and |mean_j A_j| <= L a |r|, where a = (1 - beta) / beta + p.
    3. u_k = E ||M_j^k - G_j^k||_2^2 obeys u_{k+1} <= (1 - alpha_D/2) u_k + c h_k^2 + (1 - alpha_D)
       beta^2 sigma^2, as fresh noise is independent of the rest, h_k = beta (grad f_j(W^{k+1}) -
       M_j^k): |h|^2 <= 2 (L_j / rho)^2 (1 + 2 beta p)^2 |r|^2 + 2 sigma^2 (beta^3 K + beta).
    4. e_k^2 <= 2 ||mean_j (M_j^k - grad f_j(X^k))||_*^2 + 2 rho_bar^2 mean_j ||M_j^k - G_j^k||_2^2,
       hence N as in the bound and, in place of zeta, 6 L^2 a^2 + 12 c/alpha_D (rho_bar/rho)^2
       L_bar^2 (1 + 2 beta p)^2, which the poster's zeta exceeds for all alpha_P, alpha_D and beta.
    """

    L: float
    L_bar: float
    delta0: float
    rho: float
    rho_bar: float
    alpha_D: float = 1.0
    alpha_P: float = 1.0
    sigma: float = 0.0
    workers: int = 1

    def beta(self, rounds: int) -> float:
        """The momentum parameter for K = `rounds`; 1 where sigma = 0."""
        if self.sigma == 0:
            return 1.0
        scale = self.delta0 * self.L / (self.rho**2 * self.sigma**2 * rounds)
        return min(
            1.0,
            (scale * self.workers) ** (1 / 2),
            (scale * self.alpha_D) ** (1 / 3),
            (scale * self.alpha_D**2) ** (1 / 4),
        )

    def zeta(self, rounds: int) -> float:
        """What the step pays for stale momentum and for the two compressions."""
        beta, alpha_P, alpha_D = self.beta(rounds), self.alpha_P, self.alpha_D
        of_f = 12 / beta**2 + 24 * (beta + 2) / alpha_P**2
        of_workers = 36 * (beta**2 + 4) / alpha_D**2
        of_workers += 144 * beta**2 * (2 * beta + 5) / (alpha_P**2 * alpha_D**2)
        return (self.rho_bar / self.rho) ** 2 * (of_f * self.L**2 + of_workers * self.L_bar**2)

    def gamma(self, rounds: int) -> float:
        """The step size: t^k = gamma ||G^k||_*."""
        return 1 / (2 * sqrt(self.zeta(rounds)) + 2 * self.L)

    def bound(self, rounds: int) -> float:
        """Of the mean over k < K = `rounds` of E ||grad f(X^k)||_*^2."""
        beta, alpha_D = self.beta(rounds), self.alpha_D
        c = (1 - alpha_D) * (1 + 2 / alpha_D)
        noise = (beta + 1 / (beta * rounds)) / self.workers + (1 - alpha_D) * beta**2 / alpha_D
        noise += 2 * c * (beta**3 + beta / rounds) / alpha_D
        start = 4 * self.delta0 / (self.gamma(rounds) * rounds)
        return start + 24 * (self.rho_bar * self.sigma) ** 2 * noise


@dataclass(frozen=True)
class GeneralizedSmooth:
    """Convergence under (L^0, L^1)-smoothness, for rounds K (A1, A2, A4, A5).

    ||grad f(X) - grad f(Y)||_* <= (`L0` + `L1` ||grad f(X)||_*) ||X - Y|| for all X, Y, the f_j
    likewise with L_j^0 and L_j^1; `L0_bar` = mean_j L_j^0, `L1_max` = max_j L_j^1, `dissimilarity`
    = mean_j (L_j^1)^2 (f^* - f_j^*). There is no compression by the servers. M_j^0 = grad f_j(X^0;
    xi_j^0) and G_j^0 = C_j(M_j^0), as `EF21Muon` starts by default; t^k is constant: lr=`radius`.
    All from the poster.
    """

    L0: float
    L1: float
    L0_bar: float
    L1_max: float
    dissimilarity: float
    delta0: float
    rho: float
    rho_bar: float
    alpha_D: float = 1.0
    sigma: float = 0.0
    workers: int = 1

    def beta(self, rounds: int) -> float:
        """The momentum parameter for K = `rounds`."""
        return (rounds + 1) ** (-1 / 2)

    def eta(self, rounds: int) -> float:
        """The largest eta that is allowed for K = `rounds`."""
        root, s = sqrt(rounds + 1), sqrt(1 - self.alpha_D)
        of_workers = 24 * self.rho_bar / self.rho * self.L1_max**2
        delayed = s / (1 - s) * of_workers / root
        return 1 / sqrt(max(1, 6 * self.L1**2 / root, delayed, of_workers))

    def radius(self, rounds: int) -> float:
        """t of every round."""
        return self.eta(rounds) / (rounds + 1) ** (3 / 4)

    def bound(self, rounds: int) -> float:
        """Of the least over k = 0, ..., K of E ||grad f(X^k)||_*, K = `rounds`."""
        eta, k, s = self.eta(rounds), rounds + 1, sqrt(1 - self.alpha_D)
        delay = s / (1 - s)
        of_workers = 8 / k ** (1 / 4) + 8 * delay / k ** (3 / 4)
        noise = 16 * delay / k ** (1 / 2) + 8 / (sqrt(self.workers) * k ** (1 / 4))
        return (
            3 * self.delta0 / (eta * k ** (1 / 4))
            + eta * self.L0 / k ** (3 / 4)
            + self.rho_bar * self.sigma * noise
            + eta * self.rho_bar / self.rho * of_workers * (self.dissimilarity + self.L0_bar)
        )
