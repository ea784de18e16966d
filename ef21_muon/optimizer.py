"""EF21-Muon (Gruntkowska et al., arXiv:2510.00643), Algorithm 1, as a torch optimizer."""

from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from ef21_muon.checks import (
    check_group,
    choice,
    refuse_unused_decays,
    require_mean_estimate,
    whole_number,
)
from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.exchange.layers import LayerBatch, batch_layers, lmo_costs
from ef21_muon.exchange.phases import current, new_phases
from ef21_muon.lmo.norms import AdaptiveRadius, Norm, Spectral
from ef21_muon.messages.compressors import Compressor, Identity
from ef21_muon.messages.feedback import FEEDBACK
from ef21_muon.messages.switch import Switch, starts
from ef21_muon.served import ServedOptimizer


class EF21Muon(ServedOptimizer):
    """One `step()` after `loss.backward()` on every worker is one round of Algorithm 1.

    Gradients are local: do not wrap the model in DistributedDataParallel. The parameters are the
    model shift W, bit-identical on all workers. With an initialised process group every rank is a
    worker, and the servers are placed by `server`; without one there is a single worker, nothing is
    sent and the mathematics is the same.

    params: parameters, (name, parameter) pairs, or groups with any of the entries below of their
    own, from `lr` to `server_momentum`. `lr` times `radius` is the radius t^k of line 3, so
    schedulers act on `lr`; an AdaptiveRadius makes it follow each layer's dual norm. `beta` in
    (0, 1] is the weight of the new gradient in the momentum (line 9); `norm` gives the LMO; `w2s`
    and `s2w` are the workers' and the servers' compressors C_j and C; a Switch in place of the
    first changes it from a round on. With `nesterov` workers send beta grad_j + (1 - beta) M_j in
    place of M_j. `weight_decay` subtracts lr weight_decay X with the step (Muon; 1 is Scion's
    constraint to a ball). Without EF21 the servers add up messages with `server_momentum`, and an
    `error_decay` below 1 lets EF14 forget what was not sent.

    `feedback`: "ef21", or "ef14" or "none" (`ef21_muon.messages.feedback`). `momentum_start`: M_j^0
    is the first "gradient", or beta times it, the average with "zero", as in Muon and Scion.
    `first_message`: "compressed", so that G_j^0 = C_j(M_j^0) and no gradient is ever sent whole, or
    "exact", so that G_j^0 = M_j^0 as the L-smooth theorem has it, in float32.

    `server` places the servers (`ef21_muon.exchange.placement`), "auto" where the busiest rank
    sends or receives the least; batches of layers travel in up to `buckets` messages each way, so
    that one is on its way while the next is encoded. Numbers are the same for any choice. With
    `missing` "zero" a parameter without a gradient has that on this worker, as where a branch or an
    expert was not taken; "refuse" raises an error. `seed`
    drives what is random in compressors. A parameter of n entries in one dimension is an (n, 1)
    matrix, one of more than two dimensions is flattened to (d_0, rest). Weights that are stored as
    (d_in, d_out), unlike torch.nn.Linear's, are in a group with `transposed` True. With `kernels`
    True the step of a convolution with kernels of k entries is over sqrt(k), as is Scion's
    (arXiv:2502.07529), sqrt(d_out / d_in) / k.

    Raises ValueError for hyperparameters outside their range and for parameters that differ
    between ranks, RuntimeError from `step` for a parameter whose gradient is missing or does not
    fit. Gradients that are not finite are noticed by `check_finite`.
    """

    RULE = ("norm", "radius", "w2s", "s2w")

    def __init__(
        self,
        params,
        lr: float = 0.02,
        *,
        beta: float = 0.1,
        norm: Norm | None = None,
        radius: float | AdaptiveRadius = 1.0,
        w2s: Compressor | Switch | None = None,
        s2w: Compressor | None = None,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        feedback: str = "ef21",
        error_decay: float = 1.0,
        server_momentum: float = 0.0,
        momentum_start: str = "gradient",
        first_message: str = "compressed",
        server: str = "auto",
        buckets: int = 4,
        missing: str = "refuse",
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ):
        defaults = {
            "lr": lr,
            "beta": beta,
            "error_decay": error_decay,
            "server_momentum": server_momentum,
            "norm": norm or Spectral(),
            "radius": radius,
            "w2s": w2s or Identity(),
            "s2w": s2w or Identity(),
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "transposed": False,
            "kernels": False,
        }
        whole_number("buckets", buckets, least=1)
        self.feedback = FEEDBACK[choice("feedback", feedback, FEEDBACK)]
        momenta = ("gradient", "zero")
        self._momentum_from_zero = choice("momentum_start", momentum_start, momenta) == "zero"
        first_messages = ("compressed", "exact")
        first_exact = choice("first_message", first_message, first_messages) == "exact"
        super().__init__(
            params,
            defaults,
            seed=seed,
            purposes=("w2s", "s2w"),
            process_group=process_group,
            missing=missing,
        )
        refuse_unused_decays(self.param_groups, feedback)
        self._place_servers(server, self.param_groups, lmo_costs(self.param_groups))
        self._begin(batch_layers(self.param_groups, self.server, *place_in(process_group)))
        rules = [self.param_groups[batch.group]["w2s"] for batch in self.batches]
        if first_exact:
            rules = [Switch(Identity(), rule, start=1) for rule in rules]
        self.phases = new_phases(self.batches, rules, self._begins(rules), buckets, process_group)

    def _begins(self, rules: list[Compressor | Switch]) -> set[int]:
        """The rounds from which on a message has another size."""
        return set().union(*map(starts, rules))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])

    def _round(self) -> Traffic:
        for batch in self.batches:
            batch.take_over()
        phase = current(self.phases, self.round)
        messages = [self._to_servers(phase, bucket) for bucket in phase.buckets]  # lines 9-12
        shifts = [  # lines 14 and 3-6
            self._to_workers(phase, bucket, receive)
            for bucket, receive in zip(phase.buckets, messages, strict=True)
        ]
        for bucket, receive in zip(phase.buckets, shifts, strict=True):
            self._to_parameters(bucket, receive)  # line 8
        for batch in self.batches:
            batch.note_versions()
        return phase.exchange.traffic()

    def _worker_message(self, batch: LayerBatch) -> Tensor:
        """Lines 9-11: the payload of R_j, one row a layer."""
        gradients = self._gradients(batch)
        group = self.param_groups[batch.group]
        first = self.round == 0 and not self._momentum_from_zero
        beta = 1.0 if first else group["beta"]  # M_j^0 = gradient
        torch._foreach_lerp_(list(batch.momentum.unbind()), gradients, beta)
        target = batch.momentum
        if group["nesterov"]:
            target = torch.stack(gradients).lerp_(batch.momentum, 1 - beta)
        return self._compress(batch, target, batch.gradient_estimate, group["error_decay"])

    def _receive(self, batch: LayerBatch, from_workers: tuple[Tensor, ...]) -> None:
        """Line 14."""
        if not self.feedback.accumulates:
            batch.server_gradient.mul_(self.param_groups[batch.group]["server_momentum"])
        self._add_mean(batch, batch.server_gradient, from_workers)

    def _server_message(self, batch: LayerBatch) -> Tensor:
        """Lines 3-5: the payload of S for the layers owned here."""
        shift = self._lmo_step(batch)
        if batch.server_model is not None:
            batch.server_model += shift
            shift = batch.server_model - batch.served_parameters()
        return batch.s2w.encode(shift, self.generators["s2w"])

    def _lmo_step(self, batch: LayerBatch) -> Tensor:
        """Line 3: X^{k+1} - X^k for the layers owned here."""
        group = self.param_groups[batch.group]
        step = group["norm"].lmo(batch.server_gradient)
        if group["kernels"]:
            step /= sqrt(batch.kernel)
        if isinstance(group["radius"], AdaptiveRadius):
            rows, columns = batch.server_gradient.flatten(1)[:, None], step.flatten(1)[..., None]
            dual = -torch.bmm(rows, columns).flatten()  # of an exact LMO, the dual norm
            step.mul_(group["radius"](dual)[:, None, None]).mul_(group["lr"])
        else:
            step.mul_(group["lr"] * group["radius"])
        if group["weight_decay"]:
            model = batch.server_model
            model = batch.served_parameters() if model is None else model
            step.sub_(model, alpha=group["lr"] * group["weight_decay"])
        return step

    def _update(self, batch: LayerBatch, received: Tensor) -> None:
        """Line 8: W <- W + S."""
        torch._foreach_add_(batch.params, batch.as_parameters(received))

    def go_on_after(self, steps: int) -> None:
        super().go_on_after(steps)
        for batch in self.batches:
            batch.versions = None

    def check_agreement(self) -> None:
        """Raise ValueError if workers hold different W, or if EF21's G is not the mean of G_j.

        Names rank and layer; to be called on all ranks. Waits for the device. The second is told
        from random projections, so that a few bytes a layer are sent.
        """
        super().check_agreement()
        if self.feedback.accumulates:  # the others remember no G_j
            require_mean_estimate(self.batches, self.process_group)
