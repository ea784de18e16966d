"""Layers as optimizers see them: batches of matrices of one shape, their state and their messages.

Layers of one group and shape are a batch, (L, m, n): a vector of n entries is (n, 1), a parameter
of more than two dimensions (d_0, rest), or (d_1, d_0 and the rest) where the group's weights are
stored `transposed`.
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
SERVER = "server_"  # what the names of a server's state begin with


class Batch:
    """Layers of one group and shape, in the order of their owners.

    `owned_by` has the layers that each rank is the server of, `owned` those of this rank. `state`
    has float32 tables by name, a matrix per layer; those whose name begins with "server_" have the
    layers owned here alone. `up` and `down` are the channels to the servers and back. `broken_at`
    (L,) is the first step, counted from 1, whose gradient was not finite, or, of local steps, after
    which the parameter was not; 0 if there was none.
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
        """Tensors of these layers' parameters as m x n matrices."""
        if self.transposed:
            tensors = map(_turned, tensors)
        return list(map(torch.reshape, tensors, [self.shape] * len(self.params)))

    def as_parameters(self, matrices: Tensor) -> list[Tensor]:
        """(L, m, n) as tensors of the parameters' shapes."""
        shaped = []
        for matrix, parameter in zip(matrices, self.params, strict=True):
            if self.transposed:
                shaped.append(_turned(matrix.view(_turned(parameter).shape)))
            else:
                shaped.append(matrix.view(parameter.shape))
        return shaped

    def models(self, layers: slice = slice(None)) -> Tensor:
        """The parameters of some of the layers, (layers, m, n) in their own dtype."""
        return torch.stack([*self.matrices(self.params)][layers]).detach()

    def zeros(self, layers: slice = slice(None)) -> Tensor:
        """A float32 zero for some of the layers, (layers, m, n)."""
        count = len(self.params[layers])
        return torch.zeros(count, *self.shape, dtype=torch.float32, device=self.device)

    def keep(self, name: str, table: Tensor | None = None) -> Tensor:
        """Have a table in the state from here on, zero if it is not given."""
        if table is None:
            table = self.zeros(self.layers_of(name))
        self.state[name] = table
        return table

    def send_with(
        self, compressor: Compressor, feedback: str, buffer: str = "gradient_estimate"
    ) -> None:
        """Open the channel to the servers; buffer: the name of the table that feedback needs."""
        table = None if feedback == "none" else self.keep(buffer)
        lost = torch.zeros_like(self.broken_at)
        self.up = Channel(compressor, self.shape, feedback, table, lost)

    def layers_of(self, name: str) -> slice:
        """The layers that a table of this name has."""
        return self.owned if name.startswith(SERVER) else slice(None)

    def parameter_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Views of each parameter's part of the state."""
        state = {parameter: {} for parameter in self.params}
        for name, table in self.state.items():
            for row, parameter in enumerate(self.params[self.layers_of(name)]):
                state[parameter][name] = table[row]
        return state

    def note(self) -> None:
        """Note how often parameters were written, and where they are."""
        self.written = self._now()

    def take_over(self, always: bool = False) -> None:
        """X = W where somebody has changed W since `note`, as a model's load_state_dict does.

        What is written into a parameter's `.data` goes unnoticed.
        """
        model = self.state.get("server_model")
        if model is not None and (always or self.written not in (None, self._now())):
            model.copy_(self.models(self.owned))

    def _now(self) -> list[tuple[int, int]]:
        found = []
        for parameter in self.params:
            found.append((parameter._version, parameter.data_ptr()))
        return found

    def swap(self) -> None:
        """Have the parameters and W, apart from them, change places."""
        shifts = self.as_parameters(self.state["global_params"])  # views
        for parameter, shift in zip(self.params, shifts, strict=True):
            local_model = parameter.clone()
            parameter.copy_(shift)
            shift.copy_(local_model)

    def shift_error(self) -> list[float]:
        """||X - W|| / ||X|| of the layers owned here; 0 where nothing is lost on the way."""
        if (model := self.state.get("server_model")) is not None:
            return relative_error(self.models(self.owned).float(), model).tolist()
        if (error := self.state.get("server_error")) is None:
            return [0.0] * len(self.names[self.owned])
        of_error = torch.linalg.matrix_norm(error)
        model = torch.linalg.matrix_norm(self.state["global_params"][self.owned] - error)
        return torch.where(of_error == 0, 0.0, of_error / model).tolist()

    def shared(self) -> Iterator[tuple[str, Tensor]]:
        """Of every layer its name and what all workers hold alike: W."""
        return zip(self.names, self.state.get("global_params", self.params), strict=True)

    def nothing_owned(self) -> Tensor:
        """The message back of a rank that serves none of the layers, uint8 (0, size)."""
        return torch.empty(0, self.down.size, dtype=torch.uint8, device=self.device)


def _turned(tensor: Tensor) -> Tensor:
    """From a parameter's first two dimensions to (d_out, d_in), or back."""
    return tensor.transpose(0, 1) if tensor.ndim > 1 else tensor


def named_layers(groups: Sequence[dict]) -> Iterator[tuple[int, str, Tensor, tuple[int, int]]]:
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


def lmo_costs(groups: Sequence[dict]) -> list[int]:
    """Multiplications of the LMO of every layer of parameter groups with a norm."""
    return [groups[index]["norm"].cost(*shape) for index, _, _, shape in named_layers(groups)]


def entry_counts(groups: Sequence[dict]) -> list[int]:
    """Of every layer; what serving it costs where there is no LMO."""
    return [parameter.numel() for _, _, parameter, _ in named_layers(groups)]


def assign(costs: list[int], ranks: int) -> list[int]:
    """A rank for each layer: by decreasing cost, each to the rank with the least so far (LPT).

    costs: what the LMO of each layer takes, in multiplications.
    """
    load, owners = [0] * ranks, [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        owner = min(range(ranks), key=load.__getitem__)
        owners[layer] = owner
        load[owner] += costs[layer]
    return owners


def owned_layers(assigned: list[int], server: str, ranks: int) -> list[slice]:
    """The layers of a batch that each rank owns, by placement.

    assigned: the rank that `assign` chose for each layer, in increasing order. `rank0`: rank 0 owns
    all; `sharded`: as assigned; `replicated`: every rank owns all. Raises ValueError for another
    name.
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
    ends, total, done = [], sum(sizes), 0
    for place, size in enumerate(sizes, 1):
        done += size
        if done * parts >= total * (len(ends) + 1):
            ends.append(place)
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def form_batches(
    groups: Sequence[dict], costs: list[int], server: str, rank: int, ranks: int
) -> list[Batch]:
    """Batches by group, shape and kernels, with their servers and channels without feedback.

    groups: with the entries params, w2s and s2w; costs: of what the server of each layer does;
    server: a placement. The order within a batch does not depend on it, so that a worker's random
    numbers meet the same layers wherever the servers are.
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
    """A parameter of `entries` entries, and whether a missing gradient of it is "zero".

    Or "error", or "skip": then what there is of it is somebody else's business.
    """

    name: str
    parameter: Tensor
    entries: int
    missing_grad: str


def layers_of(batches: Sequence[Batch], missing_grad: str) -> list[Layer]:
    """Whose gradients an optimizer of these batches needs."""
    return [
        Layer(name, parameter, prod(batch.shape), missing_grad)
        for batch in batches
        for name, parameter in zip(batch.names, batch.params, strict=True)
    ]


def in_buckets(batches: Sequence[Batch], most: int) -> list[list[Batch]]:
    """At most so many runs of batches, with about the same bytes to send; each is one message."""
    sizes = [len(batch.params) * batch.up.size for batch in batches]
    return [[batches[b] for b in part] for part in cut(sizes, most)]
