"""Layers as optimizers see them: batches of matrices of one shape, with their state and messages.

Layers of one group and shape form a batch (L, m, n). A vector of n entries is (n, 1), and a
parameter with more than two dimensions is (d_0, the rest). In a group whose weights are stored
`transposed` it is (d_1, d_0 and the rest).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ef21_muon.channel import Channel, relative_error
from ef21_muon.compressors.base import Compressor

FEEDBACK = ("ef21", "ef14", "none")
PLACEMENTS = ("rank0", "sharded", "replicated")
AUTO = "auto"  # the placement that takes the least time
SERVER = "server_"  # the prefix of tables in the state of servers


class Batch:
    """Layers of one group and shape, in the order of their owner ranks.

    Args:
        group: the index of the parameter group.
        names: the names of the layers.
        params: the parameters.
        shape: (m, n) of the layers as matrices.
        transposed: whether parameters are stored as (n, m, ...).
        owned_by: for every rank the layers that it owns, that is, whose server it is.
        rank: the index of this rank in `owned_by`.

    Attributes:
        owned: the layers that this rank owns.
        state: float32 tables by name, with one matrix per layer. Tables whose names begin with
            "server_" hold only the layers owned here.
        up: the channel to the servers.
        down: the channel back to the workers.
        broken_at: int64 (L,), for each layer the first step, counted from 1, whose gradient was not
            finite (with local steps, after which the parameter was not finite), or 0.
    """

    up: Channel
    down: Channel
    written: list[tuple[int, int]] | None = None

    def __init__(
        self,
        group: int,
        names: list[str],
        params: list[Tensor],
        shape: tuple[int, int],
        transposed: bool,
        owned_by: Sequence[slice] = (slice(None),),
        rank: int = 0,
    ):
        self.group, self.names, self.params, self.shape = group, names, params, shape
        self.transposed = transposed
        self.owned_by, self.owned = owned_by, owned_by[rank]
        self.serves = len(params[self.owned]) > 0  # whether this rank owns a layer
        everything = slice(0, len(params))
        self.replicated = all(part == everything for part in owned_by)
        self.device = params[0].device
        self.kernel = prod(params[0].shape[2:])  # entries of a convolution's kernel, or 1
        self.state: dict[str, Tensor] = {}
        self.broken_at = torch.zeros(len(params), dtype=torch.int64, device=self.device)

    def matrices(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return tensors with the shapes of these parameters as m x n matrices."""
        if self.transposed:
            tensors = map(_turned, tensors)
        return list(map(torch.reshape, tensors, [self.shape] * len(self.params)))

    def as_parameters(self, matrices: Tensor) -> list[Tensor]:
        """Return matrices (L, m, n) as tensors of the parameters' shapes."""
        shaped = []
        for matrix, parameter in zip(matrices, self.params, strict=True):
            if self.transposed:
                shaped.append(_turned(matrix.view(_turned(parameter).shape)))
            else:
                shaped.append(matrix.view(parameter.shape))
        return shaped

    def models(self, layers: slice = slice(None)) -> Tensor:
        """Return the parameters of some of the layers, (layers, m, n) in their own dtype."""
        return torch.stack([*self.matrices(self.params)][layers]).detach()

    def zeros(self, layers: slice = slice(None)) -> Tensor:
        """Return float32 zeros (layers, m, n) for some of the layers."""
        count = len(self.params[layers])
        return torch.zeros(count, *self.shape, dtype=torch.float32, device=self.device)

    def keep(self, name: str, table: Tensor | None = None) -> Tensor:
        """Put a table into the state, zeros by default, and return it."""
        if table is None:
            table = self.zeros(self.layers_of(name))
        self.state[name] = table
        return table

    def send_with(
        self, compressor: Compressor, feedback: str, buffer: str = "gradient_estimate"
    ) -> None:
        """Open the channel to the servers; `buffer` names the table of the error feedback."""
        table = None if feedback == "none" else self.keep(buffer)
        lost = torch.zeros_like(self.broken_at)
        self.up = Channel(compressor, self.shape, feedback, table, lost)

    def layers_of(self, name: str) -> slice:
        """Return the layers that a table of this name holds."""
        return self.owned if name.startswith(SERVER) else slice(None)

    def parameter_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return views of each parameter's part of the state."""
        state: dict[Tensor, dict[str, Tensor]] = {parameter: {} for parameter in self.params}
        for name, table in self.state.items():
            for row, parameter in enumerate(self.params[self.layers_of(name)]):
                state[parameter][name] = table[row]
        return state

    def note(self) -> None:
        """Note the versions and addresses of the parameters, for `take_over`."""
        self.written = self._now()

    def take_over(self, always: bool = False) -> None:
        """Set X = W where the parameters were written to since `note`, as by load_state_dict.

        Writes to a parameter's `.data` go unnoticed, unless it is done `always`.
        """
        model = self.state.get("server_model")
        if model is not None and (always or self.written not in (None, self._now())):
            model.copy_(self.models(self.owned))

    def _now(self) -> list[tuple[int, int]]:
        """Return the versions and addresses of the parameters."""
        found = []
        for parameter in self.params:
            found.append((parameter._version, parameter.data_ptr()))
        return found

    def swap(self) -> None:
        """Exchange the parameters and the table of W."""
        shifts = self.as_parameters(self.state["global_params"])  # views
        for parameter, shift in zip(self.params, shifts, strict=True):
            local_model = parameter.clone()
            parameter.copy_(shift)
            shift.copy_(local_model)

    def shift_error(self) -> list[float]:
        """Return ||X - W|| / ||X|| for the layers owned here; 0 if s2w loses nothing."""
        if (model := self.state.get("server_model")) is not None:
            return relative_error(self.models(self.owned).float(), model).tolist()
        if (error := self.state.get("server_error")) is None:
            return [0.0] * len(self.names[self.owned])
        of_error = torch.linalg.matrix_norm(error)
        model = torch.linalg.matrix_norm(self.state["global_params"][self.owned] - error)
        return torch.where(of_error == 0, 0.0, of_error / model).tolist()

    def shared(self) -> Iterator[tuple[str, Tensor]]:
        """Return W of every layer, which is the same on all workers, with the layer's name."""
        return zip(self.names, self.state.get("global_params", self.params), strict=True)

    def nothing_owned(self) -> Tensor:
        """Return the message back from a rank that owns none of the layers, uint8 (0, size)."""
        return torch.empty(0, self.down.size, dtype=torch.uint8, device=self.device)


def _turned(tensor: Tensor) -> Tensor:
    """Exchange a parameter's first two dimensions, to (d_out, d_in) or back."""
    return tensor.transpose(0, 1) if tensor.ndim > 1 else tensor


def named_layers(groups: Sequence[dict]) -> Iterator[tuple[int, str, Tensor, tuple[int, int]]]:
    """Return for every layer the index of its group, its name, the parameter and (d_out, d_in).

    Raises:
        ValueError: for a parameter without entries.
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


def lmo_costs(groups: Sequence[dict]) -> list[int]:
    """Return the multiplications of the LMO of every layer, for groups with a norm."""
    return [groups[index]["norm"].cost(*shape) for index, _, _, shape in named_layers(groups)]


def entry_counts(groups: Sequence[dict]) -> list[int]:
    """Return the entries of every layer: the cost of its server if there is no LMO."""
    return [parameter.numel() for _, _, parameter, _ in named_layers(groups)]


def assign(costs: list[int], ranks: int) -> list[int]:
    """Return the owner rank of each layer, by LPT assignment (longest processing time first).

    In the order of decreasing cost, each layer goes to the rank with the least cost so far.

    Args:
        costs: the cost of each layer, as multiplications of its LMO.
        ranks: the number of ranks.
    """
    load, owners = [0] * ranks, [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        owner = min(range(ranks), key=load.__getitem__)
        owners[layer] = owner
        load[owner] += costs[layer]
    return owners


def owned_layers(assigned: list[int], server: str, ranks: int) -> list[slice]:
    """Return for every rank the layers of a batch that it owns.

    Args:
        assigned: the owner rank of each layer by `assign`, in increasing order.
        server: the placement: "rank0" (rank 0 owns all layers), "sharded" (as assigned) or
            "replicated" (every rank owns all layers).
        ranks: the number of ranks.

    Raises:
        ValueError: for another placement.
    """
    if server not in PLACEMENTS:
        names = ", ".join((AUTO, *PLACEMENTS))
        raise ValueError(f"server={server!r} is not a placement: choose {names}")
    layers = len(assigned)
    if server == "replicated":
        return [slice(0, layers)] * ranks
    if server == "rank0":
        return [slice(0, layers)] + [slice(layers, layers)] * (ranks - 1)
    bounds = [sum(owner < rank for owner in assigned) for rank in range(ranks + 1)]
    return [slice(*bounds[rank : rank + 2]) for rank in range(ranks)]


def cut(sizes: list[int], parts: int) -> list[range]:
    """Cut a sequence into at most `parts` runs, each with about the same sum of sizes."""
    ends: list[int] = []
    total, done = sum(sizes), 0
    for place, size in enumerate(sizes, 1):
        done += size
        if done * parts >= total * (len(ends) + 1):
            ends.append(place)
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def form_batches(
    groups: Sequence[dict], costs: list[int], server: str, rank: int, ranks: int
) -> list[Batch]:
    """Return batches by group, shape and kernel, with servers, and channels without feedback.

    The order within a batch is the same for every placement, so a worker's random numbers go to the
    same layers wherever the servers are.

    Args:
        groups: parameter groups with the entries params, w2s and s2w.
        costs: the cost of each layer for its server.
        server: the placement, one of `PLACEMENTS`.
        rank: the index of this rank.
        ranks: the number of ranks.
    """
    layers, assigned = list(named_layers(groups)), assign(costs, ranks)
    batched = defaultdict(list)
    for layer in sorted(range(len(layers)), key=assigned.__getitem__):
        index, name, parameter, shape = layers[layer]
        key = index, shape, parameter.shape[2:].numel()
        batched[key].append((name, parameter, assigned[layer]))
    batches = []
    for (index, shape, _), members in batched.items():
        names, params, of_layers = (list(column) for column in zip(*members, strict=True))
        owned_by = owned_layers(of_layers, server, ranks)
        transposed = groups[index].get("transposed", False)
        batch = Batch(index, names, params, shape, transposed, owned_by, rank)
        batch.up = Channel(groups[index]["w2s"], shape)
        batch.down = Channel(groups[index]["s2w"], shape)
        batches.append(batch)
    return batches


class Layer(NamedTuple):
    """A parameter with its name, its number of entries, and what a missing gradient is.

    `missing_grad` is "error", "zero", or "skip": then another optimizer looks after its gradient.
    """

    name: str
    parameter: Tensor
    entries: int
    missing_grad: str


def layers_of(batches: Sequence[Batch], missing_grad: str) -> list[Layer]:
    """Return the layers whose gradients an optimizer of these batches needs."""
    return [
        Layer(name, parameter, prod(batch.shape), missing_grad)
        for batch in batches
        for name, parameter in zip(batch.names, batch.params, strict=True)
    ]


def in_buckets(batches: Sequence[Batch], most: int) -> list[list[Batch]]:
    """Return at most `most` runs of batches with about equal bytes; each run is one message."""
    sizes = [len(batch.params) * batch.up.size for batch in batches]
    return [[batches[b] for b in part] for part in cut(sizes, most)]
