"""Dion: Distributed Orthonormalized Updates (Ahn et al., arXiv:2504.05295)."""

import hashlib
from collections.abc import Callable, Sequence
from math import ceil

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from baselines.collectives import Collectives, check_numbers, move, new_batches
from baselines.numbers import check_number
from ef21_muon.checks.guards import gradients_of, guarded_step
from ef21_muon.checks.settings import choice
from ef21_muon.communicating import Communicating
from ef21_muon.compressors.base import value_format
from ef21_muon.compressors.low_rank import orthonormal
from ef21_muon.layers import Batch
from ef21_muon.norms.newton_schulz import unit_largest
from ef21_muon.values.base import Float32, ValueFormat

EPSILON = 1e-8  # added to the norms of columns, as in the authors' code


class Dion(Communicating):
    """Momentum is orthonormalised at low rank, and only the two factors are synchronised.

    Algorithm 1 in its data-parallel form with decoupled momenta: worker j keeps M_j (m, n), all
    share Q (n, r), with r = rank_fraction min(m, n), rounded up. A step is

        B_j = M_j + G_j                                       line 3
        P = orthonormal basis of mean_j B_j Q, by QR          line 4
        R = mean_j B_j^T P                                    line 4
        M_j = B_j - (1 - mu) P R^T                            lines 5-6, error feedback
        Q = R with columns of norm 1                          line 7
        X = X - lr sqrt(m / n) P Q^T                          line 8

    so that the mean of M_j is the momentum of a single worker with the mean gradient. R is the mean
    in the error feedback too, as in the authors' code; B_j^T P in its place would change each M_j
    but not their mean, and so not X. A column of R that is zero leaves Q's as it is and does not
    move X. The QR is done on every rank.

    Factors that would be no smaller than the gradient are not sent, but the gradient, all-reduced,
    as in the authors' code.

    Groups named "hidden", and those without a name, are Dion's unless their `algorithm` is "lion".
    Other groups, and vectors in any, are Lion's (Chen et al., arXiv:2302.06675) with all-reduced
    gradients: the authors use Lion or AdamW for what is not a hidden matrix, and in their training
    script Lion, with `lion_betas` (0.95, 0.98) and no weight decay. `lion_lr` is the lr of Lion's
    groups; by default lr / sqrt(d_in) where they hold matrices, which is the authors' for an
    unembedding (and here for an embedding tied to it), else lr. A group may have an `lr`, `mu`,
    `weight_decay` and `lion_betas` of its own.

    values: the format that P and R are sent in. "float32" is summed by all-reduces. Codes cannot be
    summed, so any other format is all-gathered and decoded, a row for each column of a factor, and
    averaged by every worker; error feedback then covers the rounding of R as well.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        *,
        mu: float = 0.95,
        rank_fraction: float = 0.25,
        weight_decay: float = 0.01,
        lion_lr: float | None = None,
        lion_betas: tuple[float, float] = (0.95, 0.98),
        values: ValueFormat | str = "float32",
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ):
        check_number("rank_fraction", rank_fraction)
        if lion_lr is not None:
            check_number("lion_lr", lion_lr)
        self.rank_fraction, self.lion_lr = rank_fraction, lion_lr
        self.values = value_format(values)
        defaults = {
            "lr": lr,
            "mu": mu,
            "weight_decay": weight_decay,
            "lion_betas": lion_betas,
        }
        super().__init__(
            params,
            defaults,
            transport=Collectives(process_group),
            seed=seed,
            purposes=("values",),
            process_group=process_group,
        )
        digest = hashlib.sha256(f"{seed}/right_factor".encode()).digest()
        sketch = Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        self.factored, self.whole, self.lion = [], [], []
        batches = new_batches(self.param_groups)
        for batch in batches:
            batch.state["momentum"] = batch.zeros()
            if batch.params[0].ndim < 2 or self.param_groups[batch.group]["algorithm"] == "lion":
                self.lion.append(batch)
                continue
            rank, (m, n) = self.rank_of(*batch.shape), batch.shape
            start = torch.randn(len(batch.params), n, rank, generator=sketch, dtype=torch.float32)
            batch.state["right_factor"] = start.to(batch.params[0].device)
            size = self.values.payload_bytes(rank, m) + self.values.payload_bytes(rank, n)
            (self.factored if size < 4 * m * n else self.whole).append(batch)
        self.begin(batches)

    def add_param_group(self, param_group: dict) -> None:
        named_for_lion = param_group.get("name", "hidden") != "hidden"
        param_group.setdefault("algorithm", "lion" if named_for_lion else "dion")
        algorithm = choice("algorithm", param_group["algorithm"], ("dion", "lion"))
        own_lr = "lr" in param_group
        if algorithm == "lion":
            param_group.setdefault("weight_decay", 0.0)
        super().add_param_group(param_group)
        check_numbers(self.param_groups[-1])
        group = self.param_groups[-1]
        betas = group["lion_betas"]
        if not (isinstance(betas, Sequence) and len(betas) == 2):
            raise ValueError(f"lion_betas={betas} is not allowed: give two numbers")
        for beta in betas:
            check_number("lion_betas", beta)
        group["lion_betas"] = tuple(betas)
        if algorithm == "lion" and not own_lr:
            matrices = [p for p in group["params"] if p.ndim > 1]
            d_in = max((p.numel() // p.shape[0] for p in matrices), default=1)
            group["lr"] = group["lr"] / d_in**0.5 if self.lion_lr is None else self.lion_lr

    @property
    def title(self) -> str:
        """The method's name in figures."""
        told = "" if isinstance(self.values, Float32) else f" {self.values}"
        return f"Dion rank {100 * self.rank_fraction:.4g}%{told}"

    def rank_of(self, m: int, n: int) -> int:
        """The columns r of the factors of an m x n matrix."""
        return max(1, ceil(self.rank_fraction * min(m, n) - 1e-9))

    def step(self, closure: Callable | None = None):
        """One round of collectives, on all workers together."""
        return guarded_step(self, closure, self._take_step)

    def _take_step(self) -> None:
        with self.timer("encode"):
            for batch in self.factored:
                _accumulate(batch, gradients_of(batch, self.steps + 1))
            projections = [b.state["momentum"] @ b.state["right_factor"] for b in self.factored]
            gradients = [
                torch.stack(gradients_of(b, self.steps + 1)) for b in self.whole + self.lion
            ]
        projections, gradients = self._means(projections, gradients)
        of_whole, of_lion = gradients[: len(self.whole)], gradients[len(self.whole) :]
        with self.timer("server"):
            for batch, gradient in zip(self.whole, of_whole, strict=True):
                _accumulate(batch, gradient)
                projections.append(batch.state["momentum"] @ batch.state["right_factor"])
            dion = self.factored + self.whole
            left = [orthonormal(unit_largest(projection)) for projection in projections]
            right = [b.state["momentum"].mT @ p for b, p in zip(dion, left, strict=True)]
        means, _ = self._means(right[: len(self.factored)], [])
        right[: len(self.factored)] = means
        with self.timer("decode"):
            for batch, p, r in zip(dion, left, right, strict=True):
                self._dion_step(batch, p, r)
            for batch, gradient in zip(self.lion, of_lion, strict=True):
                self._lion_step(batch, gradient)

    def _means(
        self, factors: list[Tensor], gradients: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Over all workers: of factors (L, rows, r) as `values` say, of gradients by all-reduce."""
        if isinstance(self.values, Float32):
            with self.timer("exchange"):
                means = self.transport.mean(factors + gradients)
            return means[: len(factors)], means[len(factors) :]
        with self.timer("encode"):
            payloads = [
                self.values.encode(factor.mT, self.generators["values"]) for factor in factors
            ]
        with self.timer("exchange"):
            gathered = self.transport.gather(payloads)
            gradients = self.transport.mean(gradients)
        with self.timer("decode"):
            factors = [
                self._mean_of_payloads(of_workers, *factor.mT.shape[1:]).mT
                for of_workers, factor in zip(gathered, factors, strict=True)
            ]
        return factors, gradients

    def _mean_of_payloads(self, of_workers: Tensor, rank: int, rows: int) -> Tensor:
        """uint8 (workers, L, bytes) -> float32 (L, rank, rows)."""
        total = self.values.decode(of_workers[0], rank, rows)
        for payload in of_workers[1:]:
            total += self.values.decode(payload, rank, rows)
        return total / len(of_workers)

    def _dion_step(self, batch: Batch, p: Tensor, r: Tensor) -> None:
        """Lines 5-8. p: (L, m, r), r: (L, n, r), the same on all workers."""
        group, (m, n) = self.param_groups[batch.group], batch.shape
        batch.state["momentum"].baddbmm_(p, r.mT, alpha=group["mu"] - 1)
        norms = r.norm(dim=1, keepdim=True)
        unit = r / (norms + EPSILON)
        right_factor = batch.state["right_factor"]
        right_factor.copy_(torch.where(norms > 0, unit, right_factor))
        move(batch, group, p @ unit.mT, group["lr"] * (m / n) ** 0.5)

    def _lion_step(self, batch: Batch, gradient: Tensor) -> None:
        group, momentum = self.param_groups[batch.group], batch.state["momentum"]
        of_step, of_momentum = group["lion_betas"]
        direction = momentum.lerp(gradient, 1 - of_step).sign_()
        momentum.lerp_(gradient, 1 - of_momentum)
        move(batch, group, direction, group["lr"])


def _accumulate(batch: Batch, gradients: Sequence[Tensor]) -> None:
    """Line 3: the momentum becomes B = M + G."""
    torch._foreach_add_(list(batch.state["momentum"].unbind()), list(gradients))
