"""EF21-Muon (Gruntkowska et al., arXiv:2510.00643), Algorithm 1, as a torch optimizer."""

import hashlib

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from ef21_muon.checks import (
    check_group,
    choice,
    refuse_compressed_shifts,
    refuse_unused_decays,
    require_equal_parameters,
    require_gradients,
    require_mean_estimate,
)
from ef21_muon.compressors import Compressor, Identity
from ef21_muon.exchange import Exchange, place_in
from ef21_muon.feedback import FEEDBACK
from ef21_muon.layers import LayerBatch, batch_layers, relative_error
from ef21_muon.norms import AdaptiveRadius, Norm, Spectral
from ef21_muon.phases import Switch, current, new_phases, starts, total
from ef21_muon.timing import PhaseTimer

# The entries of a parameter group that are objects, not numbers.
RULE = ("norm", "radius", "w2s", "s2w")


class EF21Muon(torch.optim.Optimizer):
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

    `feedback`: "ef21", or "ef14" or "none" (`ef21_muon.feedback`). `momentum_start`: M_j^0 is the
    first "gradient", or beta times it, the average with "zero", as in Muon and Scion.
    `first_message`: "compressed", so that G_j^0 = C_j(M_j^0) and no gradient is ever sent whole, or
    "exact", so that G_j^0 = M_j^0 as the L-smooth theorem has it, in float32.

    `server` places the servers (`ef21_muon.exchange`); batches of layers travel in up to `buckets`
    messages each way, so that one is on its way while the next is encoded, with the same numbers
    for any value. `seed` drives what is random in compressors. A parameter of n entries in one
    dimension is an (n, 1) matrix, one of more than two dimensions is flattened to (d_0, rest).

    Raises ValueError for hyperparameters outside their range and for parameters that differ
    between ranks, RuntimeError from `step` for a parameter whose gradient is missing or does not
    fit. Gradients that are not finite are noticed by `check_finite`.
    """

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
        server: str = "sharded",
        buckets: int = 4,
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
        }
        if not (type(buckets) is int and buckets > 0):
            raise ValueError(f"buckets={buckets} is not allowed: give a whole number above 0")
        self.feedback = FEEDBACK[choice("feedback", feedback, FEEDBACK)]
        momenta = ("gradient", "zero")
        self._momentum_from_zero = choice("momentum_start", momentum_start, momenta) == "zero"
        first_messages = ("compressed", "exact")
        first_exact = choice("first_message", first_message, first_messages) == "exact"
        super().__init__(params, defaults)
        refuse_unused_decays(self.param_groups, feedback)
        if server == "replicated":
            refuse_compressed_shifts(self.param_groups)
        self.timer = PhaseTimer()
        self.watch = False
        self.round = 0
        rank, ranks = place_in(process_group)
        self._device = self.param_groups[0]["params"][0].device
        self.generators = {
            purpose: self._new_generator(seed, rank, purpose) for purpose in ("w2s", "s2w")
        }
        self.batches = batch_layers(self.param_groups, server, rank, ranks)
        for batch in self.batches:
            self.state.update(batch.state())
        rules = [self.param_groups[batch.group]["w2s"] for batch in self.batches]
        if first_exact:
            rules = [Switch(Identity(), rule, start=1) for rule in rules]
        begins = self._begins(rules)
        self.phases = new_phases(self.batches, rules, begins, buckets, process_group)
        require_equal_parameters(self._named(), self.exchange.ranks, self.exchange.group)

    def _begins(self, rules: list[Compressor | Switch]) -> set[int]:
        """The rounds from which on a message has another size."""
        return set().union(*map(starts, rules))

    def add_param_group(self, param_group: dict) -> None:
        """Used by the constructor; later groups are refused, since layers are already placed."""
        if hasattr(self, "batches"):
            raise RuntimeError("EF21Muon places its layers once: pass all groups when it is built")
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])

    @property
    def exchange(self) -> Exchange:
        """The collectives of the next round."""
        return current(self.phases, self.round).exchange

    @property
    def w2s_bytes(self) -> int:
        """Bytes that this worker has sent to the servers so far."""
        return total(self.phases, self.round, lambda exchange: exchange.w2s_bytes)

    @property
    def s2w_bytes(self) -> int:
        """Bytes that this worker has received from the servers so far."""
        return total(self.phases, self.round, lambda exchange: exchange.s2w_bytes)

    @property
    def wire_tx_bytes(self) -> int:
        """Bytes that this rank has handed to the network so far: a message to itself is not."""
        return total(
            self.phases, self.round, lambda exchange: exchange.wire_tx_bytes(exchange.rank)
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One round: lines 9-14 of Algorithm 1 for this gradient, then lines 3-8."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        require_gradients(self.batches, "EF21Muon")
        phase = current(self.phases, self.round)
        exchange, buckets = phase.exchange, phase.buckets
        for batch, compressor in zip(self.batches, phase.w2s, strict=True):
            batch.w2s = compressor
        to_servers = []
        for bucket in buckets:
            with self.timer("encode"):
                messages = [self._compress_gradient(self.batches[b]) for b in bucket]
            with self.timer("exchange"):
                to_servers.append(exchange.to_servers(messages, bucket))  # line 12
        to_workers = []
        for bucket, receive in zip(buckets, to_servers, strict=True):
            with self.timer("exchange"):
                messages = receive()
            with self.timer("decode"):
                for b, from_workers in zip(bucket, messages, strict=True):
                    self._update_server_gradient(self.batches[b], from_workers)
            with self.timer("server"):
                shifts = [self._server_step(self.batches[b]) for b in bucket]
            with self.timer("exchange"):
                to_workers.append(exchange.to_workers(shifts, bucket))  # line 6
        for bucket, receive in zip(buckets, to_workers, strict=True):
            with self.timer("exchange"):
                shifts = receive()
            with self.timer("decode"):
                for b, shift in zip(bucket, shifts, strict=True):
                    self._update_parameters(self.batches[b], shift)
        self.round += 1
        return loss

    def _compress_gradient(self, batch: LayerBatch) -> Tensor:
        """Lines 9-11: returns the payload of R_j, one row a layer."""
        gradients = self._gradients(batch)
        group = self.param_groups[batch.group]
        first = self.round == 0 and not self._momentum_from_zero
        beta = 1.0 if first else group["beta"]  # M_j^0 = gradient
        torch._foreach_lerp_(list(batch.momentum.unbind()), gradients, beta)
        target = batch.momentum
        if group["nesterov"]:
            target = torch.stack(gradients).lerp_(batch.momentum, 1 - beta)
        difference = self.feedback.difference(target, batch.gradient_estimate, group["error_decay"])
        message = batch.w2s.encode(difference, self.generators["w2s"])
        sent = batch.w2s.decode(message, *batch.shape)
        self.feedback.remember(batch.gradient_estimate, difference, sent)
        batch.contraction = None
        if self.watch:
            estimate = self.feedback.estimate(batch.gradient_estimate, sent)
            batch.contraction = 1 - relative_error(sent, difference).square_()
            batch.estimator_error = relative_error(estimate, target)
        return message

    def _gradients(self, batch: LayerBatch) -> list[Tensor]:
        gradients = batch.matrices(p.grad.float() for p in batch.params)
        finite = torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite()
        batch.broken_at.masked_fill_(~finite & (batch.broken_at == 0), self.round + 1)
        return gradients

    def _update_server_gradient(self, batch: LayerBatch, from_workers: tuple[Tensor, ...]) -> None:
        """Line 14. from_workers: of each worker the payloads (layers owned here, bytes)."""
        if len(batch.server_gradient) == 0:
            return
        if not self.feedback.accumulates:
            batch.server_gradient.mul_(self.param_groups[batch.group]["server_momentum"])
        for message in from_workers:
            received = batch.w2s.decode(message, *batch.shape)
            batch.server_gradient.add_(received, alpha=1 / len(from_workers))

    def _server_step(self, batch: LayerBatch) -> Tensor:
        """Lines 3-5: returns the payload of S for the layers owned here."""
        if len(batch.server_gradient) == 0:
            size = batch.s2w.payload_bytes(*batch.shape)
            return torch.empty(0, size, dtype=torch.uint8, device=self._device)
        shift = self._lmo_step(batch)
        if batch.server_model is not None:
            batch.server_model += shift
            shift = batch.server_model - batch.served_parameters()
        return batch.s2w.encode(shift, self.generators["s2w"])

    def _lmo_step(self, batch: LayerBatch) -> Tensor:
        """Line 3: X^{k+1} - X^k for the layers owned here."""
        group = self.param_groups[batch.group]
        step = group["norm"].lmo(batch.server_gradient)
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

    def _update_parameters(self, batch: LayerBatch, message: Tensor) -> None:
        """Line 8: W <- W + S."""
        shift = batch.s2w.decode(message, *batch.shape)
        shifts = [s.view_as(p) for s, p in zip(shift, batch.params, strict=True)]
        torch._foreach_add_(batch.params, shifts)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What compression did to each layer in the last step, for which `watch` was set to True.

        `w2s_contraction`: 1 - ||C_j(x) - x||^2 / ||x||^2 of this worker's message, the alpha that
        it achieved. `estimator_error`: ||M_j - G_j|| / ||M_j||. `model_shift_error`, of the layers
        served here: ||X - W|| / ||X||. Waits for the device. RuntimeError if it was not watched.
        """
        result = {}
        for batch in self.batches:
            if batch.contraction is None:
                raise RuntimeError("nothing was recorded: set watch=True before the step")
            columns = {
                "w2s_contraction": batch.contraction.tolist(),
                "estimator_error": batch.estimator_error.tolist(),
            }
            for layer, name in enumerate(batch.names):
                result[name] = {key: values[layer] for key, values in columns.items()}
            model = batch.server_model
            served = batch.names[batch.owned]
            errors = [0.0] * len(served)
            if model is not None:
                errors = relative_error(batch.served_parameters(), model).tolist()
            for name, error in zip(served, errors, strict=True):
                result[name]["model_shift_error"] = error
        return result

    def check_finite(self) -> None:
        """Raise FloatingPointError if a gradient of this worker was NaN or infinite so far.

        Names the layer and the step. Waits for the device, so call it where the loss is read.
        """
        broken = [
            (int(step), name)
            for batch in self.batches
            for step, name in zip(batch.broken_at.tolist(), batch.names, strict=True)
            if step
        ]
        if broken:
            step, name = min(broken)
            raise FloatingPointError(
                f"the gradient of {name} was not finite at step {step}: lower the learning rate "
                "or look at that step's data"
            )

    def check_agreement(self) -> None:
        """Raise ValueError if workers hold different W, or if EF21's G is not the mean of G_j.

        Names rank and layer; to be called on all ranks. Waits for the device. The second is told
        from random projections, so that a few bytes a layer are sent.
        """
        require_equal_parameters(self._named(), self.exchange.ranks, self.exchange.group)
        if self.feedback.accumulates:  # the others remember no G_j
            require_mean_estimate(self.batches, self.exchange.ranks, self.exchange.group)

    def state_dict(self) -> dict:
        """This rank's state alone: ranks differ in M_j and G_j, and in the layers that they serve.

        Norms and compressors are not in it; build the optimizer with the same ones to load it.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            for entry in RULE:
                del group[entry]
        generators = {purpose: g.get_state() for purpose, g in self.generators.items()}
        return {**state, "round": self.round, "generators": generators}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue exactly from a `state_dict` of the same rank, parameters and placement.

        Raises ValueError when it does not fit.
        """
        saved_groups = state_dict["param_groups"]
        layout = [(len(g["params"]), g.get("param_names")) for g in self.param_groups]
        saved_layout = [(len(g["params"]), g.get("param_names")) for g in saved_groups]
        if layout != saved_layout:
            raise ValueError(
                f"the state has parameter groups {saved_layout}, this optimizer {layout}: "
                "build it from the same groups"
            )
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in saved_groups for index in group["params"]]
        pairs = [
            (self.state[parameter], state_dict["state"][index])
            for parameter, index in zip(parameters, indices, strict=True)
        ]
        for state, saved in pairs:
            shapes, saved_shapes = (
                {key: tuple(tensor.shape) for key, tensor in sorted(one.items())}
                for one in (state, saved)
            )
            if shapes != saved_shapes:
                raise ValueError(
                    f"the state holds {saved_shapes} where this optimizer needs {shapes}: "
                    "load on the same rank, model, placement and compressors"
                )
        for state, saved in pairs:
            for key, tensor in saved.items():
                state[key].copy_(tensor)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.round = state_dict["round"]
        for purpose, generator in self.generators.items():
            generator.set_state(state_dict["generators"][purpose].cpu())

    def _new_generator(self, seed: int, rank: int, purpose: str) -> Generator:
        digest = hashlib.sha256(f"{seed}/{rank}/{purpose}".encode()).digest()
        return Generator(self._device).manual_seed(int.from_bytes(digest[:7], "little"))

    def _named(self) -> list[tuple[str, Tensor]]:
        return [pair for b in self.batches for pair in zip(b.names, b.params, strict=True)]
