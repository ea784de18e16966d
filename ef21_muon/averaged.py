"""Any torch optimizer on the mean of the workers' gradients, as for what an LMO is not used for."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ef21_muon.arithmetic import Results, of_inner
from ef21_muon.checks import (
    OUTER_NUMBERS,
    check_number,
    choice,
    refuse_unused_decays,
    whole_number,
)
from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.exchange.layers import EstimateBatch, named_layers, serve, still_where_broken
from ef21_muon.exchange.phases import new_phases
from ef21_muon.messages.compressors import Identity
from ef21_muon.messages.feedback import FEEDBACK
from ef21_muon.rules import W2S, starts_of
from ef21_muon.wrapping import WrappingOptimizer


class AveragedGradients(WrappingOptimizer):
    """All workers take the same steps of `inner`, on the mean of their gradients.

    Muon is for hidden matrices, and often AdamW for the rest: this is that AdamW on many workers.

        optimizers = [EF21Muon(hidden), AveragedGradients(torch.optim.AdamW(rest, lr=3e-4))]

    A step is a round of EF21 (Richtarik et al., arXiv:2106.05203), without a momentum of its own:

        worker:   R_j = C_j(grad_j - G_j);  G_j = G_j + R_j
        server:   G = G + mean of R_j, sent back whole
        worker:   a step of `inner` with G in place of the gradient

    inner: an optimizer, or several of different parameters, that sends nothing, as torch's own.
    `param_groups` are theirs, so schedulers act on their lr. After a step a parameter's gradient
    is G. w2s: as in EF21Muon, or a mapping from the names of groups; by default gradients are sent
    whole. `feedback`, `error_decay`, `server`, `buckets`, `missing`, `buffers` and `seed` are as in
    EF21Muon; where all that is sent is lossless there is no feedback, and G is the mean gradient.

    Memory: 4 bytes for each float32 parameter for G_j, and 4 for G on the rank that serves it.

    Raises ValueError for options out of range, for an inner optimizer that sends or needs a
    closure, for parameters or settings that differ between ranks, and where ranks get other bits
    of a step of `inner`; RuntimeError from `step` for a parameter whose gradient is missing or does
    not fit.
    """

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        *,
        w2s: W2S | None = None,
        feedback: str = "ef21",
        error_decay: float = 1.0,
        server: str = "auto",
        buckets: int = 4,
        missing: str = "refuse",
        buffers: nn.Module | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | str | None = None,
    ):
        buckets = whole_number("buckets", buckets, least=1)
        choice("feedback", feedback, FEEDBACK)
        self.error_decay = check_number("error_decay", error_decay, OUTER_NUMBERS)
        refuse_unused_decays([{"error_decay": self.error_decay, "server_momentum": 0}], feedback)
        w2s = w2s or Identity()
        super().__init__(
            inner,
            w2s,
            Identity(),
            seed=seed,
            process_group=process_group,
            missing=missing,
            buffers=buffers,
        )
        costs = [parameter.numel() for _, _, parameter, _ in named_layers(self.rules)]
        self._place_servers(server, self.rules, costs)
        batches = serve(EstimateBatch, self.rules, costs, self.server, *place_in(process_group))
        rules = [self.rules[batch.group]["w2s"] for batch in batches]
        self.phases = new_phases(batches, rules, starts_of(w2s), buckets, process_group)
        lossless = all(one.lossless for phase in self.phases for one in phase.w2s)
        self.feedback = FEEDBACK["none" if lossless else feedback]
        self._begin(batches)

    def _recomputed(self, groups: list[dict], server: str) -> Results:
        yield from super()._recomputed(groups, server)
        yield from of_inner(self.inner)

    def _round(self) -> Traffic:
        traffic = self._exchange()
        self._step_inner()
        return traffic

    def _worker_message(self, batch: EstimateBatch) -> Tensor:
        gradients = torch.stack(self._gradients(batch))
        return self._compress(batch, gradients, batch.gradient_estimate, self.error_decay)

    def _receive(self, batch: EstimateBatch, from_workers: tuple[Tensor, ...]) -> None:
        if not self.feedback.accumulates:
            batch.server_gradient.zero_()
        self._add_mean(batch, batch.server_gradient, from_workers)

    def _server_message(self, batch: EstimateBatch) -> Tensor:
        mean = batch.server_gradient
        return batch.s2w.encode(still_where_broken(mean.clone(), mean))

    def _update(self, batch: EstimateBatch, received: Tensor) -> None:
        for parameter, mean in zip(batch.params, batch.as_parameters(received), strict=True):
            parameter.grad.copy_(mean)
