"""EF21-Muon (Gruntkowska et al., arXiv:2510.00643), Algorithm 1, as a torch optimizer."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ef21_muon.channel import still_where_broken
from ef21_muon.checks.arithmetic import Results, of_norms
from ef21_muon.checks.guards import bring_gradients, gradients_of, guarded_step
from ef21_muon.checks.renamed import refuses_renamed
from ef21_muon.checks.settings import (
    check_group,
    check_number,
    choice,
    compressor_of,
    refuse_unused_decays,
    whole_number,
)
from ef21_muon.communicating import Communicating
from ef21_muon.compressors import Compressor, Identity
from ef21_muon.correction import PARTS, Correction, correction_of
from ef21_muon.layers import (
    FEEDBACK,
    Batch,
    in_buckets,
    lmo_costs,
)
from ef21_muon.norms.lmo import (
    AdaptiveRadius,
    Norm,
    Spectral,
    lr_of,
    scale_step,
    step_with_feedback,
)
from ef21_muon.norms.presets import groups_of
from ef21_muon.transport.fixed import Group, Stages, Transport, place_in, run
from ef21_muon.transport.mesh import WorkerMesh, together

GAMMA = {"gamma": ("of at least 0", lambda gamma: gamma >= 0)}


class EF21Muon(Communicating):
    """Muon, Scion and Gluon on workers that send each other compressed messages.

    Every worker calls `step()` after its own `loss.backward()`. One step is one round of
    Algorithm 1, with C_j and C for the compressors `w2s` and `s2w`:

        the worker averages its gradients       M_j = momentum M_j + (1 - momentum) grad_j   line 9
        and sends what the servers lack         R_j = C_j(M_j - G_j)                         10, 12
        and remembers what they know            G_j = G_j + R_j                              11
        the server adds up the messages         G = G + mean of R_j                          14
        and steps by a fixed length             X = X + lr radius LMO(G)                     3
        and sends what the workers lack         S = C(X - W)                                 4, 6
        all move the model                      W = W + S                                    5, 8

    What a compressor loses is sent in later rounds, since differences are sent (error feedback).
    LMO(G) is the matrix in the unit ball of a norm that points most against G: for `Spectral` it is
    minus the orthogonal factor of G, as in Muon. W are the model's parameters, bit-identical on all
    workers; G estimates the mean of M_j. Servers are roles of the same ranks, not other processes.

    Gradients are local: do not wrap the model in DistributedDataParallel. Every rank of an
    initialised process group is a worker; without one there is a single worker, which compresses as
    if it sent. A second optimizer for other parameters does not average them: write
    AveragedGradients(torch.optim.AdamW(rest)), or the workers drift apart unnoticed. A parameter
    with one dimension is an (n, 1) matrix; one with more than two is flattened to (d_0, rest).

    Args:
        params: the model, whose layers take the norms of their roles (`param_groups`, preset
            "scion"); or groups of `param_groups`; or parameters, (name, parameter) pairs or groups
            as torch's optimizers take them. A group may have its own lr, momentum, norm, radius,
            w2s, s2w, nesterov, weight_decay, error_decay, server_momentum and lmo_feedback, and
            transposed=True (weights are stored as (d_in, d_out), unlike torch.nn.Linear's) and
            conv_scaling=True (steps of convolutions with kernels of k entries are divided by
            sqrt(k), which makes them Scion's).
        lr: step length t^k in the layer's norm, divided by `radius`; at least 0. With preset
            "scion" an entry of a 768 x 768 matrix moves by 0.036 lr per step; 0.02, falling to 0 at
            the end, suits GPTs. A tensor with one entry stays a tensor, which schedulers may write.
        momentum: weight of the old momentum, in [0, 1), as in torch.optim; 0 is no momentum. The
            paper's beta is 1 - momentum.
        norm: gives the LMO; `Spectral()` by default. Not with a model, whose roles have norms.
        radius: of the norm's ball, above 0, or an `AdaptiveRadius` that follows each layer's dual
            norm (Gluon); 1 by default. Not with a model.
        w2s: compressor of messages from workers to servers: an object of `ef21_muon.compressors`,
            or its spec, as "rank:0.15:natural" (15 % of the rank), "topk:0.05" (5 % of the entries)
            or "sign". By default nothing is compressed. With a model, vectors stay in float32.
        s2w: compressor of messages from servers to workers, likewise.
        nesterov: workers send (1 - momentum) grad_j + momentum M_j in place of M_j.
        weight_decay: the step also subtracts lr weight_decay X; at least 0. With 1, X stays in the
            ball of the radius, as constrained Scion has it.
        lmo_feedback: EF-Muon: of lr radius G, and what earlier steps left of it, the step is the
            part along the LMO's direction. Steps then grow with gradients, and lr radius is the
            step size of gradient descent; `radius` has to be a number.
        lmo: "servers" as above, or "workers": workers send LMO(M_j) in place of M_j, and the step
            is lr radius G. With feedback="none" and w2s="sign" this is SignMuon, with "ef21"
            EF21-SignMuon.
        feedback: error feedback: "ef21" as above; "ef14", which sends C_j(M_j + error_decay e_j)
            with e_j for what was lost; or "none".
        error_decay: share of "ef14"'s error that is kept per round, in [0, 1].
        server_momentum: weight with which servers keep the sum of earlier messages, in [0, 1); for
            "ef14" and "none".
        momentum_kind: "polyak" is line 9. "mvr" and "hessian" correct gradients for the way that W
            has gone (`ef21_muon.correction`) by a second gradient per batch; `step` then needs a
            closure.
        gamma: weight of that correction, at least 0.
        momentum_init: "gradient": the first M_j is the gradient; "zero": M_j starts from zero, as
            in the code of Muon and Scion.
        first_message: "compressed", so that no gradient is ever sent whole; or "full": the first
            messages are sent in float32, as the theorem for L-smooth functions assumes.
        server: which ranks serve the layers: "sharded" (LPT assignment of layers to ranks),
            "rank0", "replicated" (every rank serves all layers), or "auto": where messages and LMOs
            take the least time. Results do not depend on it.
        buckets: parts that layers are sent in, at least 1: one part travels while the next is
            encoded.
        missing_grad: what a parameter without a gradient is: an "error", or "zero" on this worker,
            as for an expert that got no token. A step without any gradient is an error.
        buffers: the model, whose floating-point buffers, as the statistics of BatchNorm, become the
            mean of all workers' in every step, and are sent. By default each worker keeps its own.
        seed: of random numbers in compressors, in which all ranks differ anyway.
        mesh: `WorkerMesh` of workers with several ranks, whole or sharded by `fully_shard`; all
            ranks give the groups of the whole model, as (name, parameter) pairs.
        transport: carries the messages; by default the process group.
        process_group: of all workers, one rank each; by default torch's default group. With
            `ef21_muon.ALONE` this process is a single worker, as inside `LocalSteps`.

    Raises:
        ValueError: for options out of range, names of earlier versions, parameters or settings that
            differ between ranks, and ranks that compute other bits where all have to be alike.
        RuntimeError: from `step`, for a gradient that is missing or does not fit.

    A layer whose gradient or message is not finite stands still from then on, and the others go
    on: call `check_finite`, which names it, where the loss is read.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64))
        >>> optimizer = EF21Muon(model, lr=0.02, momentum=0.9, w2s="rank:0.25:natural")
        >>> torch.nn.functional.cross_entropy(model(torch.arange(64)), torch.arange(64)).backward()
        >>> optimizer.step()

    References:
        EF21-Muon: Gruntkowska et al., arXiv:2510.00643, Algorithm 1. Scion: arXiv:2502.07529.
        Gluon: arXiv:2505.13416. EF-Muon: arXiv:2605.08980. SignMuon: arXiv:2607.29674.
    """

    RULE = ("norm", "radius", "w2s", "s2w")

    @refuses_renamed
    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.9,
        norm: Norm | None = None,
        radius: float | AdaptiveRadius | None = None,
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
        process_group: Group = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "error_decay": error_decay,
            "server_momentum": server_momentum,
            "norm": norm or Spectral(),
            "radius": 1.0 if radius is None else radius,
            "w2s": compressor_of("w2s", w2s),
            "s2w": compressor_of("s2w", s2w),
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
        self.correction = correction_of(momentum_kind, self.gamma, mesh)
        self.momentum_init = choice("momentum_init", momentum_init, ("gradient", "zero"))
        self.first_message = choice("first_message", first_message, ("compressed", "full"))
        place: dict[str, Any] = dict(process_group=process_group, mesh=mesh, transport=transport)
        with together(mesh):
            params = groups_of(params, norm, radius, place_in(process_group)[0])
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
        """Make room for M_j and G_j, and on the owner ranks for G, X and EF-Muon's error."""
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
        """Choose what the next messages are sent with: the first ones may be sent in full."""
        for batch in self.batches if self.first_message == "full" else ():
            rule = Identity() if self.steps == 0 else self.param_groups[batch.group]["w2s"]
            batch.up.use(rule)

    def exchange_compressor(self, w2s: Compressor | str, group: str | None = None) -> None:
        super().exchange_compressor(w2s, group)
        self._choose_compressors()

    def _steps_of_all(self, server: str) -> Results:
        """Compute what all ranks have to get alike: the LMOs, where every rank is a server."""
        if server == "replicated" and self.lmo == "servers":
            yield from of_norms(self.param_groups)

    def step(self, closure: Callable | None = None) -> Any:
        """Take one round, on all workers together.

        Args:
            closure: function that clears the gradients, evaluates a batch, calls backward and
                returns the loss. Needed, and called twice, with a `momentum_kind` other than
                "polyak".

        Returns:
            The closure's loss, None without a closure.

        Raises:
            RuntimeError: on the rank whose gradient is missing or does not fit. Others wait, and
                report for whom: end the run, rather than skip a batch on one rank.
        """
        if self.correction:
            closure = self._corrected(self.correction, closure)
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

    def _round(self, batches: Sequence[Batch]) -> Stages:
        """Algorithm 1 for one bucket of layers, line by line; yields where messages travel."""
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
        del from_workers  # else all messages would be kept until the end of the round
        self.timer.phase("server")
        payloads = map(self._server_message, batches)  # lines 3 to 5
        shifts = yield self.transport.to_workers, batches, [*payloads]  # line 6
        self.timer.phase("decode")
        for batch, shift in zip(batches, shifts, strict=True):  # line 8: W = W + S
            torch._foreach_add_(batch.params, batch.as_parameters(batch.down.decode(shift)))

    def _worker_message(self, batch: Batch) -> Tensor:
        """Lines 9 to 11: update M_j and G_j; returns R_j = C_j(M_j - G_j), one row per layer."""
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
        """Lines 3 to 5: update X; returns S = C(X - W) of the layers owned here, a row each."""
        if not batch.serves:
            return batch.nothing_owned()
        shift, model = self._server_step(batch), batch.state.get("server_model")
        if model is not None:
            model += shift
            shift = model - batch.models(batch.owned).float()
        return batch.down.encode(shift, self.generators["s2w"])

    def _server_step(self, batch: Batch) -> Tensor:
        """Line 3: X^{k+1} - X^k of the layers owned here; zero where G is not finite."""
        group, gradient = self.param_groups[batch.group], batch.state["server_gradient"]
        lr, source = lr_of(group, batch.device), gradient
        if group["lmo_feedback"]:
            source = batch.state["server_lmo_error"]
            step = step_with_feedback(group, lr, gradient, source)
        else:
            step = gradient.clone() if self.lmo == "workers" else group["norm"].lmo(gradient)
            scale_step(group, lr, gradient, step, batch.kernel)
        if group["weight_decay"]:
            model = batch.state.get("server_model")
            model = batch.models(batch.owned).float() if model is None else model
            step -= lr * group["weight_decay"] * model  # not fused, as some processors would
        return still_where_broken(step, source)

    def _corrected(self, correction: Correction, closure: Callable | None) -> Callable:
        """Make of the closure one that leaves corrected gradients."""
        layers = [
            (parameter, before, self.param_groups[batch.group]["momentum"])
            for batch in self.batches
            for parameter, before in zip(
                batch.params, batch.as_parameters(batch.state["previous_model"]), strict=True
            )
        ]
        bring = partial(bring_gradients, self.guards.layers, type(self).__name__)
        return correction.corrected(closure, layers, bring, first=not self.begun)

    def resume_after(self, steps: int) -> None:
        super().resume_after(steps)
        self._choose_compressors()
        for batch in self.batches:
            batch.written = None  # X belongs to whatever W is there now

    @torch.no_grad()
    def take_over(self, changed: bool = True) -> None:
        """Set X = W where somebody else has changed W; later changes will be noticed.

        Args:
            changed: whether W may have been changed since the last step; default True.
        """
        for batch in self.batches:
            if changed:
                batch.take_over()
            batch.note()

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Forget all state but the parameters, as if built from them now; keep counting steps."""
        self.begun = False
        for batch in self.batches:
            torch._foreach_zero_([*batch.state.values()])
            batch.take_over(always=True)
            batch.note()
