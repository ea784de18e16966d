"""EF21-Muon (Gruntkowska et al., arXiv:2510.00643), Algorithm 1, as a torch optimizer."""

import hashlib
from math import isfinite

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from ef21_muon.compressors import Compressor, Identity
from ef21_muon.exchange import Exchange, cut, place_in
from ef21_muon.fingerprint import fingerprint
from ef21_muon.layers import LayerBatch, batch_layers
from ef21_muon.norms import Norm, Spectral
from ef21_muon.timing import PhaseTimer

RULE = ("norm", "w2s", "s2w")  # the entries of a parameter group that are objects, not numbers


class EF21Muon(torch.optim.Optimizer):
    """One `step()` after `loss.backward()` on every worker is one round of Algorithm 1.

    Gradients are local: do not wrap the model in DistributedDataParallel. The parameters are the
    model shift W, bit-identical on all workers. With an initialised process group every rank is a
    worker, and the servers are placed by `server`; without one there is a single worker, nothing is
    sent and the mathematics is the same.

    params: parameters, (name, parameter) pairs, or groups with any of the entries below of their
    own. `lr` times `radius` is the radius t^k of line 3, so schedulers act on `lr`; `beta` in
    (0, 1] is the weight of the new gradient in the momentum (line 9); `norm` gives the LMO; `w2s`
    and `s2w` are the workers' and the servers' compressors C_j and C. `server` places the servers
    (`ef21_muon.exchange`); batches of layers travel in up to `buckets` messages each way, so that
    one is on its way while the next is encoded, with the same numbers for any value. `seed` drives
    what is random in compressors. A parameter of n entries in one dimension is an (n, 1) matrix,
    one of more than two dimensions is flattened to (d_0, rest).

    G_j starts at zero: the first message is C_j(M_j^0), never an uncompressed gradient.

    Raises ValueError for hyperparameters outside their range and for parameters that differ
    between ranks, RuntimeError from `step` for a parameter without a gradient. Gradients that are
    not finite are noticed by `check_finite`.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        *,
        beta: float = 0.1,
        norm: Norm | None = None,
        radius: float = 1.0,
        w2s: Compressor | None = None,
        s2w: Compressor | None = None,
        server: str = "sharded",
        buckets: int = 4,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ):
        defaults = {
            "lr": lr,
            "beta": beta,
            "norm": norm or Spectral(),
            "radius": radius,
            "w2s": w2s or Identity(),
            "s2w": s2w or Identity(),
        }
        if not (type(buckets) is int and buckets > 0):
            raise ValueError(f"buckets={buckets} is not allowed: give a whole number above 0")
        super().__init__(params, defaults)
        if server == "replicated":
            self._refuse_compressed_shifts()
        self.timer = PhaseTimer()
        self.round = 0
        rank, ranks = place_in(process_group)
        self._device = self.param_groups[0]["params"][0].device
        self._generators = {
            purpose: self._new_generator(seed, rank, purpose) for purpose in ("w2s", "s2w")
        }
        self.batches = batch_layers(self.param_groups, server, rank, ranks)
        for batch in self.batches:
            self.state.update(batch.state())
        self.exchange = Exchange(
            [batch.owned_by for batch in self.batches],
            [batch.w2s.payload_bytes(*batch.shape) for batch in self.batches],
            [batch.s2w.payload_bytes(*batch.shape) for batch in self.batches],
            process_group,
        )
        self.buckets = cut(
            [len(b.params) * b.w2s.payload_bytes(*b.shape) for b in self.batches], buckets
        )
        self._require_equal_parameters()

    def add_param_group(self, param_group: dict) -> None:
        """Used by the constructor; later groups are refused, since layers are already placed."""
        if hasattr(self, "batches"):
            raise RuntimeError("EF21Muon places its layers once: pass all groups when it is built")
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        """One round: lines 9-14 of Algorithm 1 for this gradient, then lines 3-8."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_gradients()
        to_servers = []
        for bucket in self.buckets:
            with self.timer("encode"):
                messages = [self._compress_gradient(self.batches[b]) for b in bucket]
            with self.timer("exchange"):
                to_servers.append(self.exchange.to_servers(messages, bucket))  # line 12
        to_workers = []
        for bucket, receive in zip(self.buckets, to_servers, strict=True):
            with self.timer("exchange"):
                messages = receive()
            with self.timer("decode"):
                for b, from_workers in zip(bucket, messages, strict=True):
                    self._update_server_gradient(self.batches[b], from_workers)
            with self.timer("server"):
                shifts = [self._server_step(self.batches[b]) for b in bucket]
            with self.timer("exchange"):
                to_workers.append(self.exchange.to_workers(shifts, bucket))  # line 6
        for bucket, receive in zip(self.buckets, to_workers, strict=True):
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
        beta = self.param_groups[batch.group]["beta"] if self.round else 1.0  # M_j^0 = gradient
        torch._foreach_lerp_(list(batch.momentum.unbind()), gradients, beta)
        difference = batch.momentum - batch.gradient_estimate
        message = batch.w2s.encode(difference, self._generators["w2s"])
        batch.gradient_estimate += batch.w2s.decode(message, *batch.shape)
        return message

    def _require_gradients(self) -> None:
        """Before anything changes: the other workers would wait for this one's message."""
        for batch in self.batches:
            for name, parameter in zip(batch.names, batch.params, strict=True):
                if parameter.grad is None:
                    raise RuntimeError(
                        f"{name} has no gradient: every parameter given to EF21Muon takes part in "
                        "every round; leave out those that the loss does not reach"
                    )

    def _gradients(self, batch: LayerBatch) -> list[Tensor]:
        gradients = batch.matrices(p.grad.float() for p in batch.params)
        finite = torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite()
        batch.broken_at.masked_fill_(~finite & (batch.broken_at == 0), self.round + 1)
        return gradients

    def _update_server_gradient(self, batch: LayerBatch, from_workers: Tensor) -> None:
        """Line 14. from_workers: payloads (workers, layers owned here, bytes)."""
        if len(batch.server_gradient) == 0:
            return
        for message in from_workers:
            difference = batch.w2s.decode(message, *batch.shape)
            batch.server_gradient.add_(difference, alpha=1 / len(from_workers))

    def _server_step(self, batch: LayerBatch) -> Tensor:
        """Lines 3-5: returns the payload of S for the layers owned here."""
        if len(batch.server_gradient) == 0:
            size = batch.s2w.payload_bytes(*batch.shape)
            return torch.empty(0, size, dtype=torch.uint8, device=self._device)
        group = self.param_groups[batch.group]
        shift = group["norm"].lmo(batch.server_gradient).mul_(group["lr"] * group["radius"])
        if batch.server_model is not None:
            batch.server_model += shift
            shift = batch.server_model - torch.stack(batch.matrices(batch.params[batch.owned]))
        return batch.s2w.encode(shift, self._generators["s2w"])

    def _update_parameters(self, batch: LayerBatch, message: Tensor) -> None:
        """Line 8: W <- W + S."""
        shift = batch.s2w.decode(message, *batch.shape)
        shifts = [s.view_as(p) for s, p in zip(shift, batch.params, strict=True)]
        torch._foreach_add_(batch.params, shifts)

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

    def state_dict(self) -> dict:
        """This rank's state alone: ranks differ in M_j and G_j, and in the layers that they serve.

        Norms and compressors are not in it; build the optimizer with the same ones to load it.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            for entry in RULE:
                del group[entry]
        generators = {purpose: g.get_state() for purpose, g in self._generators.items()}
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
        for purpose, generator in self._generators.items():
            generator.set_state(state_dict["generators"][purpose].cpu())

    def _new_generator(self, seed: int, rank: int, purpose: str) -> Generator:
        digest = hashlib.sha256(f"{seed}/{rank}/{purpose}".encode()).digest()
        return Generator(self._device).manual_seed(int.from_bytes(digest[:7], "little"))

    def _refuse_compressed_shifts(self) -> None:
        for group in self.param_groups:
            if not group["s2w"].lossless:
                raise ValueError(
                    f"server='replicated' sends nothing back to compress with s2w={group['s2w']}: "
                    "use s2w=identity, or server=sharded or rank0"
                )

    def _require_equal_parameters(self) -> None:
        if self.exchange.ranks == 1:
            return
        mine = torch.stack([fingerprint(p) for batch in self.batches for p in batch.params])
        every = [torch.empty_like(mine) for _ in range(self.exchange.ranks)]
        dist.all_gather(every, mine, group=self.exchange.group)
        differs = (torch.stack(every) != every[0]).nonzero().tolist()
        if differs:
            rank, layer = differs[0]
            name = [name for batch in self.batches for name in batch.names][layer]
            raise ValueError(
                f"{name} differs between rank 0 and rank {rank}: all workers start from the same "
                "parameters; build the model from one seed or broadcast it first"
            )


def _check_group(group: dict) -> None:
    allowed = {
        "lr": ("of at least 0", lambda lr: lr >= 0),
        "radius": ("above 0", lambda radius: radius > 0),
        "beta": ("above 0, at most 1", lambda beta: 0 < beta <= 1),
    }
    for name, (range_, holds) in allowed.items():
        value = group[name]
        if not (isinstance(value, float | int) and isfinite(value) and holds(value)):
            raise ValueError(f"{name}={value} is not allowed: give a number {range_}")
    for name, kind in (("norm", Norm), ("w2s", Compressor), ("s2w", Compressor)):
        if not isinstance(group[name], kind):
            raise ValueError(
                f"{name}={group[name]!r} is not allowed: give a {kind.__name__} of ef21_muon"
            )
