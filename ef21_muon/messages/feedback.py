"""Error feedback: what a worker compresses, and what it remembers of the rest.

A worker's `target` is its momentum M_j, its `memory` starts at zero, and its message is R = C(d) of
a difference d of the two. Servers add the mean of R to G, which they first multiply by a momentum
where the kind of feedback does not accumulate.
"""

import torch
from torch import Tensor


class EF21:
    """d = M_j - G_j, G_j <- G_j + R_j, and the server adds the mean of R_j to G.

    Lines 10, 11 and 14 of Algorithm 1; Richtarik et al., arXiv:2106.05203. The memory is G_j.
    """

    title = "EF21"
    accumulates = True

    @staticmethod
    def difference(target: Tensor, memory: Tensor, error_decay: float) -> Tensor:
        """What is compressed, a new tensor."""
        return target - memory

    @staticmethod
    def remember(memory: Tensor, difference: Tensor, sent: Tensor) -> None:
        """Update the memory in place; `sent` is C(difference)."""
        memory += sent

    @staticmethod
    def estimate(memory: Tensor, sent: Tensor) -> Tensor:
        """What this and, where it accumulates, earlier messages say of the worker's target."""
        return memory


class EF14(EF21):
    """d = error_decay e_j + M_j, e_j <- d - R_j, G <- server_momentum G + mean of R_j.

    The classic form of Seide et al. (2014), here with M_j for the gradient. The memory is the error
    e_j; the step size does not enter it, since an LMO does not see the scale of G (an
    AdaptiveRadius does).

    With beta = 1 gradients are compressed, and the momentum is the server's: G forgets a message in
    a few steps, for which G_j of EF21 takes other messages. Decay of the error is from Wu et al.,
    arXiv:1806.08054: if ||C(d) - d||^2 <= (1 - alpha) ||d||^2, ||e_j||^2 is at most
    (1 - alpha) / ((1 - decay) (1 - (1 - alpha) decay)) of the largest ||M_j||^2, by convexity.
    """

    title = "EF14"
    accumulates = False

    @staticmethod
    def difference(target: Tensor, memory: Tensor, error_decay: float) -> Tensor:
        return torch.add(target, memory, alpha=error_decay)

    @staticmethod
    def remember(memory: Tensor, difference: Tensor, sent: Tensor) -> None:
        memory.copy_(difference).sub_(sent)

    @staticmethod
    def estimate(memory: Tensor, sent: Tensor) -> Tensor:
        return sent


class NoFeedback(EF14):
    """d = M_j, G <- server_momentum G + mean of R_j: compressed gradient descent.

    The memory is R_j, and is not used.
    """

    title = "no feedback"

    @staticmethod
    def difference(target: Tensor, memory: Tensor, error_decay: float) -> Tensor:
        return target

    @staticmethod
    def remember(memory: Tensor, difference: Tensor, sent: Tensor) -> None:
        memory.copy_(sent)


FEEDBACK = {"ef21": EF21, "ef14": EF14, "none": NoFeedback}
