"""EF21-Muon (Gruntkowska et al., arXiv:2510.00643), Algorithm 1, as a torch optimizer."""

from collections.abc import Callable
from functools import partial
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ef21_muon.arithmetic import Results, of_norms
from ef21_muon.checks import (
    check_group,
    check_number,
    choice,
    refuse_unused_decays,
    whole_number,
)
from ef21_muon.correction import PARTS, Correction
from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.exchange.gradients import bring_gradients
from ef21_muon.exchange.layers import LayerBatch, batch_layers, lmo_costs, still_where_broken
from ef21_muon.exchange.phases import new_phases
from ef21_muon.lmo.norms import AdaptiveRadius, Norm, Spectral, along
from ef21_muon.messages.compressors import Compressor, Identity
from ef21_muon.messages.feedback import FEEDBACK
from ef21_muon.messages.switch import Switch, starts
from ef21_muon.served import ServedOptimizer


class EF21Muon(ServedOptimizer):
    """Muon, Scion and Gluon on workers that send each other compressed messages.

    Every worker calls `step()` after its own `loss.backward()`, and in it

        averages its gradients over time           M_j = (1 - beta) M_j + beta grad_j   line 9
        sends what the servers do not know yet     R_j = C_j(M_j - G_j)                 10, 12
        remembers what they know by now            G_j = G_j + R_j                      11
        as a server adds up what workers sent      G = G + mean of R_j                  14
        takes a step of a fixed length against it  X = X + lr radius LMO(G)             3
        sends what the workers do not know yet     S = C(X - W)                         4, 6
        moves the model by it                      W = W + S                            5, 8

    with the lines of Algorithm 1. C_j and C are the compressors `w2s` and `s2w`; what they lose is
    sent later, since differences are sent (error feedback). LMO(G) is the matrix in the unit ball
    of a norm that points most against G: with Spectral, minus the orthogonal factor of G, as in
    Muon. W are the model's parameters, bit-identical on all workers; G estimates the mean of M_j.

        optimizer = EF21Muon(param_groups(model, "scion"), lr=0.02, w2s=RankK(0.15, "natural"))

    Gradients are local: do not wrap the model in DistributedDataParallel. With an initialised
    process group every rank is a worker; without one there is a single worker, nothing is sent and
    the mathematics is the same.

    params: parameters, (name, parameter) pairs, or groups, which may have entries of their own from
    the first list. A parameter of n entries in one dimension is an (n, 1) matrix, one of more than
    two dimensions is flattened to (d_0, rest).

    Of every group:
        lr: times the radius is the length t^k of the step in its norm; schedulers act on it. A
            tensor with one entry stays one, as in torch's optimizers, and is read in every step.
        beta: weight of the new gradient in the momentum, in (0, 1]; 1 is no momentum.
        norm: gives the LMO, Spectral() by default.
        radius: a number, or an AdaptiveRadius, which follows each layer's dual norm (Gluon).
        w2s, s2w: the compressors; for w2s also a Switch, which changes it from a round on.
        nesterov: workers send beta grad_j + (1 - beta) M_j in place of M_j.
        weight_decay: the step also subtracts lr weight_decay X (1 is Scion's constraint to a ball).
        error_decay: of what "ef14" did not send, in a round; server_momentum: the servers add up
            messages of "ef14" and "none" with it.
        transposed: True where weights are stored as (d_in, d_out), unlike torch.nn.Linear's.
        lmo_feedback: True takes, of lr radius G and what earlier steps left of it, the part along
            the LMO's direction: EF-Muon (arXiv:2605.08980). Steps are as long as gradients are, and
            lr radius is the step size of gradient descent; radius is a number.
        kernels: True divides the step of convolutions with kernels of k entries by sqrt(k), which
            makes it Scion's (arXiv:2502.07529), sqrt(d_out / d_in) / k.

    Of all:
        feedback: "ef21" as above, "ef14" or "none" (`ef21_muon.messages.feedback`).
        momentum: "polyak" is line 9. Others correct the gradient for how far W has gone
            (`ef21_muon.correction`): "mvr" and "hessian" take a second gradient of the batch, so
            that `step` needs a closure. `gamma` is the correction's weight.
        momentum_start: the first M_j is the "gradient", or with "zero" beta times it (Muon, Scion).
        first_message: "compressed", so that no gradient is ever sent whole, or "exact", so that
            G_j is M_j at first, as the L-smooth theorem has it, in float32.
        server: where the servers are (`ef21_muon.exchange.placement`); "auto" is where the busiest
            rank sends or receives the least, but not "replicated" where ranks compute other bits
            (`ef21_muon.arithmetic`). Numbers are the same for any choice.
        buckets: messages, each way, that layers travel in: one is on its way while the next is
            encoded.
        missing: "refuse" a parameter without a gradient, or let it be "zero" on this worker, as
            where a branch or an expert was not taken. A step without any gradient is refused.
        buffers: the model, whose floating-point buffers, as the running statistics of BatchNorm,
            become the mean of all workers' in every step; the bytes count. Without it they stay
            each worker's own.
        seed: of what is random in compressors.

    Raises ValueError for hyperparameters outside their range, for parameters or settings that
    differ between ranks, and where ranks get other bits of what each computes for itself;
    RuntimeError from `step` for a parameter whose gradient is missing or does not fit. What is not
    finite leaves W as it is, and is named by `check_finite`.
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
        lmo_feedback: bool = False,
        feedback: str = "ef21",
        error_decay: float = 1.0,
        server_momentum: float = 0.0,
        momentum: str = "polyak",
        gamma: float = 1.0,
        momentum_start: str = "gradient",
        first_message: str = "compressed",
        server: str = "auto",
        buckets: int = 4,
        missing: str = "refuse",
        buffers: nn.Module | None = None,
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
            "lmo_feedback": lmo_feedback,
            "transposed": False,
            "kernels": False,
        }
        buckets = whole_number("buckets", buckets, least=1)
        self.feedback = FEEDBACK[choice("feedback", feedback, FEEDBACK)]
        self.momentum = choice("momentum", momentum, ("polyak", *PARTS))
        self.gamma = check_number("gamma", gamma, {"gamma": ("of at least 0", lambda g: g >= 0)})
        self.correction = None if momentum == "polyak" else Correction(momentum, self.gamma)
        momenta = ("gradient", "zero")
        self.momentum_start = choice("momentum_start", momentum_start, momenta)
        first_messages = ("compressed", "exact")
        self.first_message = choice("first_message", first_message, first_messages)
        place = {"process_group": process_group, "missing": missing, "buffers": buffers}
        super().__init__(params, defaults, seed=seed, purposes=("w2s", "s2w"), **place)
        refuse_unused_decays(self.param_groups, feedback)
        self._place_servers(server, self.param_groups, lmo_costs(self.param_groups))
        batches = batch_layers(self.param_groups, self.server, *place_in(process_group))
        for batch in batches:
            left_out = self.param_groups[batch.group]["lmo_feedback"]
            batch.make_room("previous_model" if self.correction else None, left_out)
        self._begin(batches)
        rules = [self.param_groups[batch.group]["w2s"] for batch in self.batches]
        if first_message == "exact":
            rules = [Switch(Identity(), rule, start=1) for rule in rules]
        self.phases = new_phases(self.batches, rules, self._begins(rules), buckets, process_group)

    def _recomputed(self, groups: list[dict], server: str) -> Results:
        yield from super()._recomputed(groups, server)
        if server == "replicated":
            yield from of_norms(groups)

    def _begins(self, rules: list[Compressor | Switch]) -> set[int]:
        """The rounds from which on a message has another size."""
        return set().union(*map(starts, rules))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])

    def step(self, closure=None):
        """One round, on all workers together.

        closure: clears the gradients, evaluates a batch, calls backward and returns the loss; with
        "mvr" and "hessian" it is called twice.
        """
        if self.correction:
            closure = self._corrected(closure)
        return super().step(closure)

    def _corrected(self, closure: Callable | None) -> Callable:
        """A closure that leaves corrected gradients."""
        layers = [
            (parameter, before, self.param_groups[batch.group]["beta"])
            for batch in self.batches
            for parameter, before in zip(
                batch.params, batch.as_parameters(batch.previous), strict=True
            )
        ]
        bring = partial(bring_gradients, self._brought, type(self).__name__)
        return self.correction.corrected(closure, layers, bring, first=not self.begun)

    def _round(self) -> Traffic:
        for batch in self.batches:
            batch.take_over()
        traffic = self._exchange()  # lines 9-12, 14, 3-6 and 8, as the methods below have them
        for batch in self.batches:
            batch.note_versions()
        return traffic

    def _worker_message(self, batch: LayerBatch) -> Tensor:
        """Lines 9-11: the payload of R_j, one row a layer."""
        gradients = self._gradients(batch)
        group = self.param_groups[batch.group]
        first = not self.begun and self.momentum_start == "gradient"
        beta = 1.0 if first else group["beta"]  # M_j^0 = gradient
        torch._foreach_lerp_(list(batch.momentum.unbind()), gradients, beta)
        target = batch.momentum
        if group["nesterov"]:
            target = torch.stack(gradients).lerp_(batch.momentum, 1 - beta)
        target = self._told(target, group)
        return self._compress(batch, target, batch.gradient_estimate, group["error_decay"])

    def _told(self, momentum: Tensor, group: dict) -> Tensor:
        """What servers are to know of M_j (L, m, n): all of it."""
        return momentum

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
        """Line 3: X^{k+1} - X^k for the layers owned here; none where G is not finite."""
        group = self.param_groups[batch.group]
        if batch.server_lmo_error is None:
            step, source = self._step_of_a_length(batch, group), batch.server_gradient
        else:
            step, source = self._step_with_feedback(batch, group), batch.server_lmo_error
        if group["weight_decay"]:
            model = batch.server_model
            model = batch.served_parameters() if model is None else model
            step -= _lr(batch, group) * group["weight_decay"] * model  # not fused, as some would
        return still_where_broken(step, source)

    def _direction(self, batch: LayerBatch, group: dict) -> Tensor:
        """LMO(G)."""
        return group["norm"].lmo(batch.server_gradient)

    def _step_of_a_length(self, batch: LayerBatch, group: dict) -> Tensor:
        """lr radius LMO(G)."""
        step = self._direction(batch, group)
        if group["kernels"]:
            step /= sqrt(batch.kernel)
        if not isinstance(group["radius"], AdaptiveRadius):
            return step.mul_(_lr(batch, group) * group["radius"])
        dual = -along(batch.server_gradient, step)  # of an exact LMO, the dual norm
        return step.mul_(group["radius"](dual)[:, None, None]).mul_(_lr(batch, group))

    @staticmethod
    def _step_with_feedback(batch: LayerBatch, group: dict) -> Tensor:
        """d = e + lr radius G; the step is the part of -d along LMO(d); e <- d + step."""
        wanted = batch.server_lmo_error
        wanted += _lr(batch, group) * group["radius"] * batch.server_gradient  # not fused
        step = group["norm"].projected(wanted)
        wanted += step
        return step

    def _update(self, batch: LayerBatch, received: Tensor) -> None:
        """Line 8: W <- W + S."""
        torch._foreach_add_(batch.params, batch.as_parameters(received))

    def go_on_after(self, steps: int) -> None:
        super().go_on_after(steps)
        for batch in self.batches:
            batch.versions = None

    @torch.no_grad()
    def take_over(self, changed: bool = True) -> None:
        """X = W where somebody else has `changed` W; what is changed from here on is noticed."""
        for batch in self.batches:
            if changed:
                batch.take_over()
            batch.note_versions()

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Forget all but the parameters, as if built from them now; steps count on."""
        self.begun = False
        for batch in self.batches:
            for _, table, _ in batch.tables():
                table.zero_()
            if batch.server_model is not None:
                batch.server_model.copy_(batch.served_parameters())
            batch.note_versions()


def _lr(batch: LayerBatch, group: dict) -> float | Tensor:
    """As a factor for which the host does not wait: a number, or a scalar on the layers' device."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    device = batch.broken_at.device
    return lr.reshape(()) if lr.device == device and device.type != "cpu" else lr.item()
