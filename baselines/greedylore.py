"""GreedyLore: greedy low-rank gradient compression (Chen et al., arXiv:2507.08784)."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from ef21_muon.norms.newton_schulz import unit_largest

ERROR, BASIS = "lore_error", "lore_basis"  # their names in an optimizer's state


class GreedyLore:
    """The workers' mean gradient at rank r, in directions that fit all workers' gradients best.

    Of a matrix G_j (m, n), m <= n, or of its transpose, worker j keeps the error E_j, zero at
    first, and all share the orthonormal basis U (m, m). In step t, counted from 0,

        B_j = G_j + E_j                                   error feedback
        if t is a multiple of `refresh_every`:
            B = mean_j B_j, sent whole;  E_j = 0
            U = left singular vectors of B
        else:
            s_i = mean_j <u_i^T B_j, xi_i>                Gaussian xi_i (n,), on all the same
            P = the r columns u_i of U with the largest s_i^2
            R_j = P^T B_j;  B = P mean_j R_j;  E_j = B_j - P R_j

    and B takes the gradient's place. This is the semi-lazy subspace: U is of a step before, which
    columns of it are taken is chosen anew, by estimates of what mean_j B_j has in each of them
    (E s_i^2 = ||u_i^T mean_j B_j||^2). A step sends m + r n numbers a matrix. Vectors, and matrices
    of which that would be no less than all, are averaged whole.

    The algorithm is as public code of it has it (github.com/yiran529/GreedyLore); of the paper the
    abstract was at hand. Departures from that code: it sends G_j alone every `refresh_every` steps
    and drops E_j there, where nothing is dropped here; it sends everything whole for the first 1000
    steps, and embeddings and heads always.

    optimizer: of parameters in the same order on all ranks; E_j and U are entries of its state, so
    that they are in its checkpoints. mean: of float32 tensors over all workers, by an all-reduce.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rank: int,
        refresh_every: int,
        mean: Callable[[list[Tensor]], list[Tensor]],
    ):
        self.optimizer, self.rank, self.mean = optimizer, rank, mean
        self.refresh_every = refresh_every
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.places = {parameter: place for place, parameter in enumerate(parameters)}
        for parameter in parameters:
            m, n = wide(parameter).shape
            if m + rank * n < m * n:
                options = {"dtype": torch.float32, "device": parameter.device}
                optimizer.state[parameter][ERROR] = torch.zeros(m, n, **options)
                optimizer.state[parameter][BASIS] = torch.eye(m, **options)

    @torch.no_grad()
    def average(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: int) -> None:
        """Put B in the place of this worker's gradients, which are changed; on all workers."""
        state = self.optimizer.state
        wanted = {
            parameter: wide(gradient).float() + state[parameter][ERROR]
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if ERROR in state[parameter]
        }
        chosen = self._choose(wanted, step) if step % self.refresh_every else {}
        sent = [
            chosen[p].mT @ wanted[p] if p in chosen else wanted.get(p, gradient.float())
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        for p, gradient, mean in zip(parameters, gradients, self.mean(sent), strict=True):
            if p not in wanted:
                gradient.copy_(mean)
            elif p in chosen:
                state[p][ERROR].copy_(wanted[p] - chosen[p] @ (chosen[p].mT @ wanted[p]))
                wide(gradient).copy_(chosen[p] @ mean)
            else:
                state[p][ERROR].zero_()
                # The SVD of numbers that are not finite raises; the gradient keeps them.
                scaled = unit_largest(mean[None])[0].nan_to_num()
                state[p][BASIS].copy_(torch.linalg.svd(scaled, full_matrices=False).U)
                wide(gradient).copy_(mean)

    def _choose(self, wanted: dict[Tensor, Tensor], step: int) -> dict[Tensor, Tensor]:
        """P (m, r) of every matrix."""
        bases = {parameter: self.optimizer.state[parameter][BASIS] for parameter in wanted}
        estimates = []
        for parameter, x in wanted.items():
            digest = hashlib.sha256(f"{step}/{self.places[parameter]}".encode()).digest()
            probes = Generator(x.device).manual_seed(int.from_bytes(digest[:7], "little"))
            probe = torch.randn(x.shape, generator=probes, dtype=torch.float32, device=x.device)
            estimates.append((bases[parameter].mT @ x * probe).sum(1))
        return {
            parameter: bases[parameter][:, mean.square().topk(self.rank).indices]
            for parameter, mean in zip(wanted, self.mean(estimates), strict=True)
        }


def wide(tensor: Tensor) -> Tensor:
    """A parameter's tensor as a matrix (m, n), m <= n, of the same memory; a vector is one row."""
    matrix = tensor.view(len(tensor), -1) if tensor.ndim > 1 else tensor.view(1, -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
