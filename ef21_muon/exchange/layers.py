"""Layers, their state, and how they are grouped into batches."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from ef21_muon.exchange.placement import AUTO, busiest, owned_layers, spread
from ef21_muon.messages.compressors import Compressor
from ef21_muon.messages.switch import in_round, starts


@dataclass(kw_only=True)
class Batch:
    """Layers of one group, shape and size of kernels, processed as L matrices (m, n).

    A vector of n entries is (n, 1), a parameter of more than two dimensions (d_0, rest), or
    (d_1, d_0 and the rest) where the group's weights are stored `transposed`. `broken_at` (L,) is
    the first step, counted from 1, whose gradient was not finite, or, of local steps, after which
    the parameter was not; 0 if there was none. `unsent_at` is that of a message.
    """

    group: int
    transposed: bool
    names: list[str]
    params: list[Tensor]
    shape: tuple[int, int]
    broken_at: Tensor = field(init=False)
    unsent_at: Tensor = field(init=False)

    def __post_init__(self):
        device = self.params[0].device
        self.broken_at = torch.zeros(len(self.params), dtype=torch.int64, device=device)
        self.unsent_at = self.broken_at.clone()

    @property
    def kernel(self) -> int:
        """The entries of a convolution's kernel; 1 for other layers."""
        return prod(self.params[0].shape[2:])

    def matrices(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Tensors of these layers' parameters as m x n matrices."""
        return [self._turned(tensor).reshape(self.shape) for tensor in tensors]

    def as_parameters(self, matrices: Tensor) -> list[Tensor]:
        """(L, m, n) as tensors of the parameters' shapes."""
        return [
            self._turned(matrix.view(self._turned(parameter).shape))
            for matrix, parameter in zip(matrices, self.params, strict=True)
        ]

    def _turned(self, tensor: Tensor) -> Tensor:
        """From a parameter's first two dimensions to (d_out, d_in), or back."""
        return tensor.transpose(0, 1) if self.transposed and tensor.ndim > 1 else tensor

    def zeros(self, layers: slice = slice(None)) -> Tensor:
        """A float32 zero for some of the layers, (layers, m, n)."""
        params = self.params[layers]
        return torch.zeros(
            len(params), *self.shape, dtype=torch.float32, device=self.params[0].device
        )

    def tables(self) -> Iterator[tuple[str, Tensor, slice]]:
        """Of every part of the state its name, its matrices, and the layers that they are of."""
        raise NotImplementedError

    def parameter_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Views of each parameter's part of the state."""
        state = {parameter: {} for parameter in self.params}
        for name, matrices, layers in self.tables():
            for row, parameter in enumerate(self.params[layers]):
                state[parameter][name] = matrices[row]
        return state


@dataclass(kw_only=True)
class ServedBatch(Batch):
    """Layers of one rule too, ordered by owner.

    They are sent by `w2s` and come back by `s2w`; `owned_by` has the layers that each rank serves,
    `owned` those of this rank. `contraction` and `estimator_error` (L,) are those of a watched
    step.
    """

    w2s: Compressor
    s2w: Compressor
    owned_by: list[slice]
    owned: slice
    contraction: Tensor | None = None
    estimator_error: Tensor | None = None

    @property
    def serves(self) -> bool:
        """Whether this rank owns a layer."""
        return self.owned.stop > self.owned.start

    def shift_error(self) -> Tensor | None:
        """||X - W|| / ||X|| of the layers owned here; None where nothing is lost on the way."""
        raise NotImplementedError

    def served_parameters(self) -> Tensor:
        """The layers owned here, (owned layers, m, n) float32."""
        return torch.stack(self.matrices(p.detach().float() for p in self.params[self.owned]))


@dataclass(kw_only=True)
class EstimateBatch(ServedBatch):
    """Layers whose gradients servers estimate.

    Worker state, (L, m, n) float32: `gradient_estimate` G_j (or what other kinds of feedback
    remember). Server state of the layers `owned` by this rank: `server_gradient` G.
    """

    gradient_estimate: Tensor = field(init=False)
    server_gradient: Tensor = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        self.gradient_estimate, self.server_gradient = self.zeros(), self.zeros(self.owned)

    def shift_error(self) -> Tensor | None:
        return None

    def tables(self) -> Iterator[tuple[str, Tensor, slice]]:
        yield "gradient_estimate", self.gradient_estimate, slice(None)
        yield "server_gradient", self.server_gradient, self.owned


@dataclass(kw_only=True)
class LayerBatch(EstimateBatch):
    """Layers of Algorithm 1.

    Worker state beside G_j, (L, m, n) float32: `momentum` M_j. Server state beside G, where s2w
    loses anything: the iterate `server_model` X; the model shift W is the parameters themselves.
    With `lmo_feedback` also `server_lmo_error`, what steps left out. Where gradients are corrected,
    `previous` is what the last step is remembered by.
    """

    momentum: Tensor = field(init=False)
    server_model: Tensor | None = None
    server_lmo_error: Tensor | None = None
    previous: Tensor | None = None
    previous_name: str = ""
    versions: list[tuple[int, int]] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.note_versions()
        self.momentum = self.zeros()
        if self.serves and not self.s2w.lossless:
            self.server_model = self.served_parameters()

    def make_room(self, previous_name: str | None, lmo_feedback: bool) -> None:
        """For what is left out of a step, and remembered of it: "previous_model" or the like."""
        if previous_name:
            self.previous, self.previous_name = self.zeros(), previous_name
        if lmo_feedback:
            self.server_lmo_error = self.zeros(self.owned)

    def note_versions(self) -> None:
        """Of the parameters as they are: later ones tell that somebody else has changed them."""
        self.versions = self._versions()

    def take_over(self) -> None:
        """X = W where W was changed from outside, as by a model's load_state_dict.

        What is written into a parameter's `.data` goes unnoticed. Without `versions`, as after an
        optimizer's load_state_dict, any W is the one that X goes with.
        """
        if self.server_model is None or self.versions is None:
            return
        if self._versions() != self.versions:
            self.server_model.copy_(self.served_parameters())

    def _versions(self) -> list[tuple[int, int]]:
        """Of every parameter how often it was written, and where it is."""
        return [(parameter._version, parameter.data_ptr()) for parameter in self.params]

    def shift_error(self) -> Tensor | None:
        if self.server_model is None:
            return None
        return relative_error(self.served_parameters(), self.server_model)

    def tables(self) -> Iterator[tuple[str, Tensor, slice]]:
        yield "momentum", self.momentum, slice(None)
        yield from super().tables()
        if self.previous is not None:
            yield self.previous_name, self.previous, slice(None)
        if self.server_model is not None:
            yield "server_model", self.server_model, self.owned
        if self.server_lmo_error is not None:
            yield "server_lmo_error", self.server_lmo_error, self.owned


@dataclass(kw_only=True)
class RoundBatch(ServedBatch):
    """Layers that workers step by themselves between rounds.

    `model_shift` W (L, m, n), in the parameters' dtype, is what all workers agree on; the
    parameters are this worker's own x_j. Worker state, float32: `memory`, the error e_j, or G_j of
    EF21. Server state of the layers owned here, where there is any: `server_momentum` V,
    `server_gradient`, EF21's G, and `server_error` e_s. Where messages travel for some steps,
    `message` and `server_message` are the payloads under way, and `departure` is the x_j that the
    first was made of. `outer_gradient` lives within a server's turn.
    """

    memory_name: str = "error"
    model_shift: Tensor | None = None
    memory: Tensor | None = None
    server_momentum: Tensor | None = None
    server_gradient: Tensor | None = None
    server_error: Tensor | None = None
    departure: Tensor | None = None
    message: Tensor | None = None
    server_message: Tensor | None = None
    outer_gradient: Tensor | None = None

    def __post_init__(self):
        super().__post_init__()
        self.model_shift = self.local_models()
        self.memory = self.zeros()

    def make_room(self, accumulates: bool, outer_momentum: float) -> None:
        """For the servers' state; `accumulates` is the feedback's."""
        if accumulates:
            self.memory_name = "gradient_estimate"
            self.server_gradient = self.zeros(self.owned)
        if outer_momentum:
            self.server_momentum = self.zeros(self.owned)
        if not self.s2w.lossless:
            self.server_error = self.zeros(self.owned)

    def local_models(self) -> Tensor:
        """x_j, (L, m, n) in the parameters' dtype."""
        return torch.stack(self.matrices(parameter.detach() for parameter in self.params))

    def keep_messages(self, size: int, both_ways: bool) -> None:
        """Room for messages under way between steps, of `size` bytes a layer to the servers."""
        self.departure = self.model_shift.clone()
        self.message = self.model_shift.new_zeros(len(self.params), size, dtype=torch.uint8)
        if both_ways:
            size = self.s2w.payload_bytes(*self.shape)
            served = len(self.params[self.owned])
            self.server_message = self.message.new_zeros(served, size)

    def take_over(self) -> None:
        """W = x_j before the first step: a model may have been loaded since this was built."""
        self.model_shift.copy_(self.local_models())

    def told(self) -> Tensor:
        """The x_j that the last message was made of."""
        return self.local_models() if self.departure is None else self.departure

    @property
    def gradient_estimate(self) -> Tensor:
        """G_j, where EF21 remembers it."""
        return self.memory

    def tables(self) -> Iterator[tuple[str, Tensor, slice]]:
        yield "model_shift", self.model_shift, slice(None)
        yield self.memory_name, self.memory, slice(None)
        for name in ("departure", "message"):
            if (table := getattr(self, name)) is not None:
                yield name, table, slice(None)
        for name in ("server_momentum", "server_gradient", "server_error", "server_message"):
            if (table := getattr(self, name)) is not None:
                yield name, table, self.owned

    def shift_error(self) -> Tensor | None:
        if self.server_error is None:
            return None
        error = torch.linalg.matrix_norm(self.server_error)
        model = torch.linalg.matrix_norm(self.model_shift[self.owned] - self.server_error)
        return torch.where(error == 0, 0.0, error / model)


Batches = TypeVar("Batches", bound=ServedBatch)


def named_layers(groups: list[dict]) -> Iterator[tuple[int, str, Tensor, tuple[int, int]]]:
    """Of every layer its group's index, its name, the parameter and its shape (d_out, d_in).

    Raises ValueError for a parameter without entries.
    """
    for index, group in enumerate(groups):
        unnamed = [f"parameter {place} of group {index}" for place in range(len(group["params"]))]
        names = group.get("param_names", unnamed)
        for name, parameter in zip(names, group["params"], strict=True):
            if parameter.numel() == 0:
                raise ValueError("a parameter has no entries: leave it out of the groups")
            transposed = group.get("transposed", False) and parameter.ndim > 1
            rows = parameter.shape[int(transposed)] if parameter.ndim else 1
            yield index, name, parameter, (rows, parameter.numel() // rows)


def batch_layers(groups: list[dict], server: str, rank: int, ranks: int) -> list[LayerBatch]:
    """Batches of Algorithm 1, with their state at zero and X = W; servers by the costs of LMOs.

    groups: the optimizer's parameter groups. Raises ValueError for a parameter without entries.
    """
    return serve(LayerBatch, groups, lmo_costs(groups), server, rank, ranks)


def lmo_costs(groups: list[dict]) -> list[int]:
    """What the LMO of every layer takes."""
    return [groups[index]["norm"].cost(*shape) for index, _, _, shape in named_layers(groups)]


def traffic_by_placement(groups: list[dict], costs: list[int], ranks: int) -> dict[str, int]:
    """Bytes of the busiest rank in a round, for every placement that these compressors allow.

    The first is that of the least; a Switch counts as what it is at last.
    """
    w2s, s2w, lossless = [], [], True
    for index, _, _, shape in named_layers(groups):
        up, back = groups[index]["w2s"], groups[index]["s2w"]
        up = in_round(up, max(starts(up)))
        w2s.append(up.fit(*shape).payload_bytes(*shape))
        s2w.append(back.fit(*shape).payload_bytes(*shape))
        lossless &= back.lossless
    traffic = busiest(w2s, s2w, spread(costs, ranks), ranks)
    if not lossless:
        del traffic["replicated"]
    return dict(sorted(traffic.items(), key=lambda one: one[1]))


def serve(
    kind: type[Batches], groups: list[dict], costs: list[int], server: str, rank: int, ranks: int
) -> list[Batches]:
    """Group layers by group, shape and kernels, each a batch of this kind, and give them servers.

    groups: with the entries params, w2s and s2w; costs: of what the server of each layer does;
    server: a placement, or "auto". The order within a batch does not depend on it, so that a
    worker's random numbers meet the same layers wherever the servers are.
    """
    if server == AUTO:
        server, *_ = traffic_by_placement(groups, costs, ranks)
    layers = list(named_layers(groups))
    spread_over = spread(costs, ranks)
    batched = defaultdict(list)
    for layer in sorted(range(len(layers)), key=spread_over.__getitem__):
        index, name, parameter, shape = layers[layer]
        key = index, shape, parameter.shape[2:].numel()
        batched[key].append((name, parameter, spread_over[layer]))
    batches = []
    for (index, shape, _), members in batched.items():
        names, params, of_layer = (list(column) for column in zip(*members, strict=True))
        owned_by = owned_layers(of_layer, server, ranks)
        batches.append(
            kind(
                group=index,
                transposed=groups[index].get("transposed", False),
                names=names,
                params=params,
                shape=shape,
                w2s=in_round(groups[index]["w2s"], 0).fit(*shape),
                s2w=groups[index]["s2w"].fit(*shape),
                owned_by=owned_by,
                owned=owned_by[rank],
            )
        )
    return batches


def finite(matrices: Tensor) -> Tensor:
    """Whether all entries of a matrix are, for every one of a batch (L, m, n)."""
    return matrices.amax((1, 2)).isfinite() & matrices.amin((1, 2)).isfinite()


def still_where_broken(change: Tensor, source: Tensor) -> Tensor:
    """`change` (L, m, n), in place, but none of layers of whose `source` not all is finite."""
    return change.masked_fill_(~finite(source)[:, None, None], 0)


def mark(at: Tensor, broken: Tensor, step: int) -> None:
    """Note in `at` (L,) the step of layers that are `broken`, but where it has an earlier one."""
    at.masked_fill_(broken & (at == 0), step)


def relative_error(estimate: Tensor, of: Tensor) -> Tensor:
    """||estimate - of|| / ||of|| for every matrix of a batch (L, m, n); 0 where both are zero."""
    error = torch.linalg.matrix_norm(estimate - of)
    return torch.where(error == 0, 0.0, error / torch.linalg.matrix_norm(of))
