"""What Dion and DeMo share: batches of equal shape, collectives that count, and the manners."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from ef21_muon.checks import is_number, require_equal_parameters, require_gradients
from ef21_muon.exchange import place_in
from ef21_muon.timing import PhaseTimer

AT_LEAST_0 = "of at least 0", lambda value: value >= 0
BELOW_1 = "of at least 0, below 1", lambda value: 0 <= value < 1
RANGES = {  # of hyperparameters, told and checked
    "lr": AT_LEAST_0,
    "lion_lr": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "mu": BELOW_1,
    "decay": BELOW_1,
    "betas": BELOW_1,
    "lion_betas": BELOW_1,
    "rank_fraction": ("above 0, at most 1", lambda value: 0 < value <= 1),
}


@dataclass
class Batch:
    """Parameters of one group and one shape, processed as L matrices (m, n).

    `state` holds float32 tensors with a row for each of them. A vector of n entries is (n, 1), and
    a parameter of more than two dimensions (d_0, rest). `broken_at` (L,) is the first step, counted
    from 1, whose gradient was not finite, 0 if there was none.
    """

    group: int
    names: list[str]
    params: list[Tensor]
    shape: tuple[int, int]
    broken_at: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_vector(self) -> bool:
        return self.params[0].ndim < 2

    def zeros(self) -> Tensor:
        return torch.zeros(len(self.params), *self.shape, device=self.params[0].device)


class Collectives:
    """The collectives of a process group, one packed buffer each, and the bytes they take.

    Without an initialised process group there is one worker, and nothing is sent.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank, self.ranks = place_in(group)
        self.reduced_bytes = self.gathered_bytes = 0

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over all workers of float32 tensors, by an all-reduce."""
        if not tensors:
            return []
        buffer = torch.cat([tensor.flatten() for tensor in tensors])
        self.reduced_bytes += buffer.nbytes
        if self.ranks > 1:
            dist.all_reduce(buffer, group=self.group)
            buffer /= self.ranks
        parts = buffer.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, payloads: Sequence[Tensor]) -> list[Tensor]:
        """Payloads of all workers, by an all-gather: uint8 (L, bytes) -> (workers, L, bytes)."""
        if not payloads:
            return []
        message = torch.cat([payload.flatten() for payload in payloads])
        self.gathered_bytes += message.nbytes
        received = message[None]
        if self.ranks > 1:
            received = message.new_empty(self.ranks, len(message))
            dist.all_gather(list(received), message, group=self.group)
        parts = received.split([payload.numel() for payload in payloads], 1)
        return [
            part.unflatten(1, payload.shape) for part, payload in zip(parts, payloads, strict=True)
        ]


class LocalOptimizer(torch.optim.Optimizer):
    """An optimizer of local gradients that itself keeps the parameters equal on all workers.

    Do not wrap the model in DistributedDataParallel. A subclass takes a step in `_round`.

    Raises ValueError for hyperparameters outside their range and for parameters that differ between
    ranks, RuntimeError from `step` for a parameter whose gradient is missing or does not fit.
    Gradients that are not finite are noticed by `check_finite`.
    """

    def __init__(self, params, defaults: dict, seed: int, process_group: dist.ProcessGroup | None):
        super().__init__(params, defaults)
        self.process_group = process_group
        self.collectives = Collectives(process_group)
        self.timer = PhaseTimer()
        self.round = 0
        device = self.param_groups[0]["params"][0].device
        digest = hashlib.sha256(f"{seed}/{self.collectives.rank}/values".encode()).digest()
        generator = Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        self.generators = {"values": generator}  # for the stochastic rounding of messages
        self.batches = _batches(self.param_groups)
        self.check_agreement()

    def add_param_group(self, param_group: dict) -> None:
        """Used by the constructor; later groups are refused, since batches are already formed."""
        if hasattr(self, "batches"):
            raise RuntimeError(
                f"{type(self).__name__} forms its batches once: pass all groups when it is built"
            )
        super().add_param_group(param_group)
        for name in ("lr", "mu", "decay", "weight_decay"):
            if name in self.param_groups[-1]:
                check_number(name, self.param_groups[-1][name])

    @property
    def w2s_bytes(self) -> int:
        """Bytes that this worker has handed to collectives so far."""
        return self.collectives.reduced_bytes + self.collectives.gathered_bytes

    @property
    def s2w_bytes(self) -> int:
        """Bytes that it got back so far: sums, and the messages of the others."""
        sent = self.collectives
        return sent.reduced_bytes + (sent.ranks - 1) * sent.gathered_bytes

    @property
    def wire_tx_bytes(self) -> int:
        """Bytes that this rank has handed to the network so far.

        A ring all-reduce of n ranks sends 2 (n - 1) / n of the buffer, an all-gather the message
        n - 1 times.
        """
        sent = self.collectives
        reduced = 2 * (sent.ranks - 1) * sent.reduced_bytes // sent.ranks
        return reduced + (sent.ranks - 1) * sent.gathered_bytes

    @torch.no_grad()
    def step(self, closure=None):
        """One step, on all workers together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        require_gradients(self.batches, type(self).__name__)
        self._round()
        self.round += 1
        return loss

    def _round(self) -> None:
        raise NotImplementedError

    def _gradients(self, batch: Batch) -> list[Tensor]:
        """Of this worker, float32 (m, n) each."""
        gradients = [parameter.grad.float().reshape(batch.shape) for parameter in batch.params]
        finite = torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite()
        batch.broken_at.masked_fill_(~finite & (batch.broken_at == 0), self.round + 1)
        return gradients

    def _move(self, batch: Batch, direction: Tensor, length: float) -> None:
        """X <- (1 - lr weight_decay) X - length direction, with direction (L, m, n)."""
        group = self.param_groups[batch.group]
        if group["weight_decay"]:
            torch._foreach_mul_(batch.params, 1 - group["lr"] * group["weight_decay"])
        steps = [step.view_as(p) for step, p in zip(direction, batch.params, strict=True)]
        torch._foreach_add_(batch.params, steps, alpha=-length)

    def _share_state(self) -> None:
        """Make every row of the batches' state the state of its parameter."""
        for batch in self.batches:
            for row, parameter in enumerate(batch.params):
                self.state[parameter] = {key: rows[row] for key, rows in batch.state.items()}

    def check_finite(self) -> None:
        """Raise FloatingPointError if a gradient of this worker was NaN or infinite so far.

        Names the parameter and the step. Waits for the device.
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
        """Raise ValueError if workers hold different parameters; to be called on all ranks.

        Waits for the device.
        """
        named = [pair for b in self.batches for pair in zip(b.names, b.params, strict=True)]
        require_equal_parameters(named, self.collectives.ranks, self.process_group)

    def state_dict(self) -> dict:
        """This worker's state alone: workers differ in their momenta."""
        return {
            **super().state_dict(),
            "round": self.round,
            "reduced_bytes": self.collectives.reduced_bytes,
            "gathered_bytes": self.collectives.gathered_bytes,
            "generators": {key: one.get_state() for key, one in self.generators.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue exactly from a `state_dict` of the same rank, parameters and options.

        Raises ValueError when it does not fit.
        """
        own = super().state_dict()
        if _layout(own) != _layout(state_dict):
            raise ValueError(
                f"the state holds {_layout(state_dict)} where this optimizer needs {_layout(own)}: "
                "build it from the same groups and options"
            )
        for index, saved in state_dict["state"].items():
            for key, tensor in saved.items():
                own["state"][index][key].copy_(tensor)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.round = state_dict["round"]
        self.collectives.reduced_bytes = state_dict["reduced_bytes"]
        self.collectives.gathered_bytes = state_dict["gathered_bytes"]
        for key, generator in self.generators.items():
            generator.set_state(state_dict["generators"][key].cpu())


def check_number(name: str, value: float) -> None:
    """Raise ValueError unless the value is a finite number in its range."""
    range_, holds = RANGES[name]
    if not (is_number(value) and holds(value)):
        raise ValueError(f"{name}={value} is not allowed: give a number {range_}")


def _layout(state_dict: dict) -> list[tuple]:
    """The parameters' names by group, and the shapes of their state."""
    return [
        (
            group.get("param_names"),
            [
                {key: tuple(tensor.shape) for key, tensor in state_dict["state"][index].items()}
                for index in group["params"]
            ],
        )
        for group in state_dict["param_groups"]
    ]


def _batches(groups: list[dict]) -> list[Batch]:
    """Parameters by group and shape. Raises ValueError for a parameter without entries."""
    batched = defaultdict(list)
    for index, group in enumerate(groups):
        unnamed = [f"parameter {place} of group {index}" for place in range(len(group["params"]))]
        for named in zip(group.get("param_names", unnamed), group["params"], strict=True):
            parameter = named[1]
            if parameter.numel() == 0:
                raise ValueError("a parameter has no entries: leave it out of the groups")
            rows = parameter.shape[0] if parameter.ndim else 1
            shape = rows, parameter.numel() // rows
            batched[index, shape, parameter.ndim < 2].append(named)
    batches = []
    for (index, shape, _), members in batched.items():
        names, params = (list(column) for column in zip(*members, strict=True))
        broken_at = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
        batches.append(Batch(index, names, params, shape, broken_at))
    return batches
