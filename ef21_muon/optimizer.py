"""EF21-Muon (Gruntkowska et al., arXiv:2510.00643), Algorithm 1, as a torch optimizer."""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ef21_muon.arithmetic import Results, of_norms
from ef21_muon.channel import still_where_broken
from ef21_muon.communicating import Communicating, together
from ef21_muon.compressors import Compressor, Identity
from ef21_muon.correction import PARTS, Correction
from ef21_muon.guards import bring_gradients, gradients_of, guarded_step
from ef21_muon.layers import (
    FEEDBACK,
    Batch,
    in_buckets,
    lmo_costs,
)
from ef21_muon.norms.lmo import AdaptiveRadius, Norm, Spectral, along
from ef21_muon.renamed import refuses_renamed
from ef21_muon.settings import (
    check_group,
    check_number,
    choice,
    refuse_unused_decays,
    whole_number,
)
from ef21_muon.transport.fixed import Transport, run
from ef21_muon.transport.mesh import WorkerMesh

GAMMA = {"gamma": ("of at least 0", lambda gamma: gamma >= 0)}


class EF21Muon(Communicating):
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

    Gradients are local: do not wrap the model in DistributedDataParallel. Every rank of an
    initialised process group is a worker; without one there is a single one, and nothing is sent.

    params: parameters, (name, parameter) pairs, or groups, which may have entries of their own from
    the first list. A parameter of n entries in one dimension is an (n, 1) matrix, one of more than
    two dimensions is flattened to (d_0, rest).

    Of every group:
        lr: times the radius is the length t^k of the step in its norm; schedulers act on it. A
            tensor with one entry stays one, as in torch's optimizers, and is read in every step.
        beta: weight of the new gradient in the momentum, in (0, 1]; 1 is no momentum.
        norm: gives the LMO, Spectral() by default.
        radius: a number, or an AdaptiveRadius, which follows each layer's dual norm (Gluon).
        w2s, s2w: the compressors.
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
        feedback: "ef21" as above, "ef14" or "none" (`ef21_muon.layers.Channel`).
        lmo: with "workers" every worker sends LMO(M_j), in place of M_j, and the step is lr radius
            G: SignMuon with feedback="none" and signs for w2s, and EF21-SignMuon with "ef21"
            (arXiv:2607.29674).
        momentum: "polyak" is line 9. "mvr" and "hessian" correct the gradient for how far W has
            gone (`ef21_muon.correction`), by a second gradient of the batch, so that `step` needs
            a closure. `gamma` is the correction's weight.
        momentum_init: the first M_j is the "gradient", or with "zero" beta times it (Muon, Scion).
        first_message: "compressed", so that no gradient is ever sent whole, or "exact", so that
            G_j is M_j at first, as the L-smooth theorem has it, in float32.
        server: where the servers are (`ef21_muon.layers`); "auto" is where messages
            and LMOs of the busiest rank take the least time (`ef21_muon.transport.load`), but not
            "replicated" where ranks compute other bits (`ef21_muon.arithmetic`). Numbers are the
            same for any choice.
        buckets: messages, each way, that layers travel in: one is on its way while the next is
            encoded.
        missing_grad: "error" refuses a parameter without a gradient, or let it be "zero" on this worker, as
            where a branch or an expert was not taken. A step without any gradient is refused.
        buffers: the model, whose floating-point buffers, as the running statistics of BatchNorm,
            become the mean of all workers' in every step; the bytes count. Without it they stay
            each worker's own.
        seed: of what is random in compressors.
        mesh: of workers of several ranks; params are then those of the whole model, as (name,
            parameter) pairs in groups that are alike on all ranks, whole or sharded over a worker's
            ranks by torch's `fully_shard`. `param_groups` has the layers that this rank steps.
        transport: what messages travel by; by default the process group.

    Raises ValueError for hyperparameters outside their range, for parameters or settings that
    differ between ranks, and where ranks get other bits of what each computes for itself;
    RuntimeError from `step` for a parameter whose gradient is missing or does not fit. What is not
    finite leaves W as it is, and is named by `check_finite`.
    """

    RULE = ("norm", "radius", "w2s", "s2w")

    @refuses_renamed
    def __init__(
        self,
        params,
        lr: float = 0.02,
        *,
        momentum: float = 0.9,
        norm: Norm | None = None,
        radius: float | AdaptiveRadius = 1.0,
        w2s: Compressor | str = "identity",
        s2w: Compressor | str = "identity",
        nesterov: bool = False,
        weight_decay: float = 0.0,
        lmo_feedback: bool = False,
        lmo: str = "servers",
        feedback: str = "ef21",
        error_decay: float = 1.0,
        server_momentum: float = 0.0,
        momentum_kind: str = "polyak",
        gamma: float = 1.0,
        momentum_init: str = "gradient",
        first_message: str = "compressed",
        server: str = "auto",
        buckets: int = 4,
        missing_grad: str = "error",
        buffers: nn.Module | None = None,
        seed: int = 0,
        mesh: WorkerMesh | None = None,
        transport: Transport | None = None,
        process_group: dist.ProcessGroup | str | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "error_decay": error_decay,
            "server_momentum": server_momentum,
            "norm": norm or Spectral(),
            "radius": radius,
            "w2s": w2s,
            "s2w": s2w,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "lmo_feedback": lmo_feedback,
            "transposed": False,
            "conv_scaling": False,
        }
        whole_number("buckets", buckets, least=1)
        self.feedback = choice("feedback", feedback, FEEDBACK)
        self.lmo = choice("lmo", lmo, ("servers", "workers"))
        self.momentum_kind = choice("momentum_kind", momentum_kind, ("polyak", *PARTS))
        self.gamma = check_number("gamma", gamma, GAMMA)
        self.correction = _correction(momentum_kind, self.gamma, mesh)
        self.momentum_init = choice("momentum_init", momentum_init, ("gradient", "zero"))
        self.first_message = choice("first_message", first_message, ("compressed", "full"))
        place = {"process_group": process_group, "mesh": mesh, "transport": transport}
        with together(mesh):
            params = mesh.share(params) if mesh else params
            super().__init__(
                params, defaults, seed=seed, missing_grad=missing_grad, buffers=buffers, **place
            )
            self.rules = self.param_groups
            refuse_unused_decays(self.param_groups, feedback)
            batches = self.new_batches(server, lmo_costs(self.param_groups), self._steps_of_all)
            for batch in batches:
                self._make_room(batch)
            self.begin(batches)
        self._choose_compressors()
        self.buckets = in_buckets(batches, buckets)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        adaptive = isinstance(group["radius"], AdaptiveRadius)
        if self.lmo == "workers" and (adaptive or group["lmo_feedback"]):
            raise ValueError(
                f"radius={group['radius']} with lmo_feedback={group['lmo_feedback']} is not "
                "allowed with lmo='workers', whose servers take no LMO: give a number, and False"
            )

    def _make_room(self, batch: Batch) -> None:
        """For the state: M_j, G_j and, of the servers, G, X and what LMOs left out."""
        group = self.param_groups[batch.group]
        batch.keep("momentum")
        batch.send_with(group["w2s"], self.feedback)
        batch.keep("server_gradient")
        if self.correction:
            batch.keep("previous_model")
        narrow = any(torch.finfo(p.dtype).bits < 32 for p in batch.params)  # small steps are lost
        if batch.serves and (narrow or not batch.down.compressor.lossless):  # else X is W
            batch.keep("server_model", batch.models(batch.owned).float())
        if group["lmo_feedback"]:
            batch.keep("server_lmo_error")
        batch.note()

    def _choose_compressors(self) -> None:
        """For the next messages: the first may be sent exactly."""
        for batch in self.batches if self.first_message == "full" else ():
            rule = Identity() if self.steps == 0 else self.param_groups[batch.group]["w2s"]
            batch.up.use(rule)

    def exchange_compressor(self, w2s: Compressor | str, group: str | None = None) -> None:
        super().exchange_compressor(w2s, group)
        self._choose_compressors()

    def _steps_of_all(self, server: str) -> Results:
        """What every rank computes for itself: where all serve, the steps of servers."""
        if server == "replicated" and self.lmo == "servers":
            yield from of_norms(self.param_groups)

    def step(self, closure: Callable | None = None):
        """One round, on all workers together.

        closure: clears the gradients, evaluates a batch, calls backward and returns the loss; with
        a `momentum` other than "polyak" it is needed, and is called twice.
        """
        if self.correction:
            closure = self._corrected(closure)
        loss = guarded_step(self, closure, self._take_step)
        if self.steps == 1:
            self._choose_compressors()
        return loss

    def _take_step(self) -> None:
        if self.mesh:
            self.timer.phase("exchange")
            self.mesh.reduce_gradients()
        for batch in self.batches:
            batch.take_over()
        run(map(self._round, self.buckets), self.timer)
        for batch in self.batches:
            batch.note()
        if self.buffers.shared:
            self.timer.phase("exchange")
            self.average_buffers()
        if self.mesh:
            self.timer.phase("exchange")
            self.mesh.share_parameters()

    def _round(self, batches: Sequence[Batch]) -> Generator:
        """Algorithm 1 for a bucket of batches of layers, line by line."""
        self.timer.phase("encode")
        payloads = map(self._worker_message, batches)  # lines 9 to 11
        from_workers = yield self.transport.to_servers, batches, [*payloads]  # line 12
        self.timer.phase("decode")
        for batch, messages in zip(batches, from_workers, strict=True):
            gradient = batch.state["server_gradient"]
            if self.feedback != "ef21":
                gradient.mul_(self.param_groups[batch.group]["server_momentum"])
            for message in messages if batch.serves else ():  # line 14: G = G + mean of R_j
                gradient += batch.up.decode(message) * (1 / len(messages))  # rounded twice
        del from_workers  # or all messages would be kept until the round has ended
        self.timer.phase("server")
        payloads = map(self._server_message, batches)  # lines 3 to 5
        shifts = yield self.transport.to_workers, batches, [*payloads]  # line 6
        self.timer.phase("decode")
        for batch, shift in zip(batches, shifts, strict=True):  # line 8: W = W + S
            torch._foreach_add_(batch.params, batch.as_parameters(batch.down.decode(shift)))

    def _worker_message(self, batch: Batch) -> Tensor:
        """Lines 9 to 11: M_j, R_j = C_j(M_j - G_j) and G_j = G_j + R_j; R_j, one row a layer."""
        group, momentum = self.param_groups[batch.group], batch.state["momentum"]
        gradients = gradients_of(batch, self.steps + 1)
        first = not self.begun and self.momentum_init == "gradient"
        beta = 1.0 if first else 1 - group["momentum"]  # M_j^0 = gradient
        torch._foreach_lerp_(list(momentum.unbind()), gradients, beta)
        target = momentum
        if group["nesterov"]:
            target = torch.stack(gradients).lerp_(momentum, 1 - beta)
        if self.lmo == "workers":
            target = group["norm"].lmo(target)
        return batch.up.encode(target, self.generators["w2s"], group["error_decay"], self.steps + 1)

    def _server_message(self, batch: Batch) -> Tensor:
        """Lines 3 to 5: X, S = C(X - W); S of the layers owned here, one row a layer."""
        if not batch.serves:
            return batch.nothing_owned()
        shift, model = self._server_step(batch), batch.state.get("server_model")
        if model is not None:
            model += shift
            shift = model - batch.models(batch.owned).float()
        return batch.down.encode(shift, self.generators["s2w"])

    def _server_step(self, batch: Batch) -> Tensor:
        """Line 3: X^{k+1} - X^k of the layers owned here; none where G is not finite."""
        group, source = self.param_groups[batch.group], batch.state["server_gradient"]
        if group["lmo_feedback"]:
            source = batch.state["server_lmo_error"]
            step = self._step_with_feedback(batch, group)
        else:
            step = self._step_of_a_length(batch, group)
        if group["weight_decay"]:
            model = batch.state.get("server_model")
            model = batch.models(batch.owned).float() if model is None else model
            step -= _lr(batch, group) * group["weight_decay"] * model  # not fused, as some would
        return still_where_broken(step, source)

    def _step_of_a_length(self, batch: Batch, group: dict) -> Tensor:
        """lr radius LMO(G)."""
        gradient = batch.state["server_gradient"]
        step = gradient.clone() if self.lmo == "workers" else group["norm"].lmo(gradient)
        if group["conv_scaling"]:
            step /= sqrt(batch.kernel)
        if not isinstance(group["radius"], AdaptiveRadius):
            return step.mul_(_lr(batch, group) * group["radius"])
        dual = -along(gradient, step)  # of an exact LMO, the dual norm
        return step.mul_(group["radius"](dual)[:, None, None]).mul_(_lr(batch, group))

    @staticmethod
    def _step_with_feedback(batch: Batch, group: dict) -> Tensor:
        """d = e + lr radius G; the step is the part of -d along LMO(d); e <- d + step."""
        wanted = batch.state["server_lmo_error"]
        gradient = batch.state["server_gradient"]
        wanted += _lr(batch, group) * group["radius"] * gradient  # not fused
        step = group["norm"].projected(wanted)
        wanted += step
        return step

    def _corrected(self, closure: Callable | None) -> Callable:
        """A closure that leaves corrected gradients."""
        layers = [
            (parameter, before, self.param_groups[batch.group]["momentum"])
            for batch in self.batches
            for parameter, before in zip(
                batch.params, batch.as_parameters(batch.state["previous_model"]), strict=True
            )
        ]
        bring = partial(bring_gradients, self.guards.layers, type(self).__name__)
        return self.correction.corrected(closure, layers, bring, first=not self.begun)

    def go_on_after(self, steps: int) -> None:
        super().go_on_after(steps)
        self._choose_compressors()
        for batch in self.batches:
            batch.written = None  # any W is the one that X goes with

    @torch.no_grad()
    def take_over(self, changed: bool = True) -> None:
        """X = W where somebody else has `changed` W; what is changed from here on is noticed."""
        for batch in self.batches:
            if changed:
                batch.take_over()
            batch.note()

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Forget all but the parameters, as if built from them now; steps count on."""
        self.begun = False
        for batch in self.batches:
            torch._foreach_zero_([*batch.state.values()])
            batch.take_over(always=True)
            batch.note()


def _correction(kind: str, gamma: float, mesh: WorkerMesh | None) -> Correction | None:
    if kind == "polyak":
        return None
    if mesh:
        raise ValueError(
            f"momentum_kind={kind!r} is not allowed with workers of several ranks, of which each has"
            " a part of W: leave it at 'polyak', or give every worker one rank"
        )
    return Correction(kind, gamma)


def _lr(batch: Batch, group: dict) -> float | Tensor:
    """As a factor for which the host does not wait: a number, or a scalar on the layers' device."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    on_device = lr.device == batch.device and batch.device.type != "cpu"
    return lr.reshape(()) if on_device else lr.item()
