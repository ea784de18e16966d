"""Layers, their state, and how they are grouped into batches."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ef21_muon.compressors import Compressor
from ef21_muon.exchange import owned_layers, spread
from ef21_muon.phases import in_round


@dataclass
class LayerBatch:
    """Layers of one shape (m, n) and one rule, ordered by owner and processed as one batch.

    Worker state, (L, m, n) float32: `momentum` M_j and `gradient_estimate` G_j (or what other kinds
    of feedback remember). Server state of the layers `owned` by this rank: `server_gradient` G and,
    where s2w loses anything, the iterate `server_model` X; the model shift W is the parameters
    themselves. `broken_at` (L,) is the first step, counted from 1, whose gradient was not finite, 0
    if there was none. `contraction` and `estimator_error` (L,) are those of a watched step.
    """

    group: int
    names: list[str]
    params: list[Tensor]
    shape: tuple[int, int]
    w2s: Compressor
    s2w: Compressor
    owned_by: list[slice]
    owned: slice
    momentum: Tensor
    gradient_estimate: Tensor
    server_gradient: Tensor
    server_model: Tensor | None
    broken_at: Tensor
    contraction: Tensor | None = None
    estimator_error: Tensor | None = None

    def matrices(self, tensors) -> list[Tensor]:
        """Tensors of these layers' parameters as m x n matrices."""
        return [tensor.reshape(self.shape) for tensor in tensors]

    def served_parameters(self) -> Tensor:
        """W of the layers owned here, (owned layers, m, n) in the parameters' dtype."""
        return torch.stack(self.matrices(self.params[self.owned]))

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Views of each parameter's part of the state."""
        state = {
            parameter: {"momentum": momentum, "gradient_estimate": estimate}
            for parameter, momentum, estimate in zip(
                self.params, self.momentum, self.gradient_estimate, strict=True
            )
        }
        for layer, parameter in enumerate(self.params[self.owned]):
            state[parameter]["server_gradient"] = self.server_gradient[layer]
            if self.server_model is not None:
                state[parameter]["server_model"] = self.server_model[layer]
        return state


def batch_layers(groups: list[dict], server: str, rank: int, ranks: int) -> list[LayerBatch]:
    """Group layers by rule and shape, with their state at zero and X = W.

    groups: the optimizer's parameter groups. The order within a batch does not depend on `server`,
    so that a worker's random numbers meet the same layers wherever the servers are. Raises
    ValueError for a parameter without entries.
    """
    layers = [
        (index, name, parameter, _matrix_shape(parameter))
        for index, group in enumerate(groups)
        for name, parameter in zip(_names(group, index), group["params"], strict=True)
    ]
    costs = [groups[index]["norm"].cost(*shape) for index, _, _, shape in layers]
    spread_over = spread(costs, ranks)
    batched = defaultdict(list)
    for layer in sorted(range(len(layers)), key=spread_over.__getitem__):
        index, name, parameter, shape = layers[layer]
        batched[index, shape].append((name, parameter, spread_over[layer]))
    batches = []
    for (index, shape), members in batched.items():
        names, params, of_layer = (list(column) for column in zip(*members, strict=True))
        owned_by = owned_layers(of_layer, server, ranks)
        batches.append(_new_batch(index, groups[index], shape, names, params, owned_by, rank))
    return batches


def relative_error(estimate: Tensor, of: Tensor) -> Tensor:
    """||estimate - of|| / ||of|| for every matrix of a batch (L, m, n); 0 where both are zero."""
    error = torch.linalg.matrix_norm(estimate - of)
    return torch.where(error == 0, 0.0, error / torch.linalg.matrix_norm(of))


def _new_batch(index, group, shape, names, params, owned_by: list[slice], rank: int) -> LayerBatch:
    device = params[0].device
    owned = owned_by[rank]
    s2w = group["s2w"].fit(*shape)
    model = [p.detach().reshape(shape).float() for p in params[owned]]
    return LayerBatch(
        group=index,
        names=names,
        params=params,
        shape=shape,
        w2s=in_round(group["w2s"], 0).fit(*shape),
        s2w=s2w,
        owned_by=owned_by,
        owned=owned,
        momentum=torch.zeros(len(params), *shape, device=device),
        gradient_estimate=torch.zeros(len(params), *shape, device=device),
        server_gradient=torch.zeros(len(model), *shape, device=device),
        server_model=torch.stack(model) if model and not s2w.lossless else None,
        broken_at=torch.zeros(len(params), dtype=torch.int64, device=device),
    )


def _names(group: dict, index: int) -> list[str]:
    unnamed = [f"parameter {place} of group {index}" for place in range(len(group["params"]))]
    return group.get("param_names", unnamed)


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    if parameter.numel() == 0:
        raise ValueError("a parameter has no entries: leave it out of EF21Muon's groups")
    rows = parameter.shape[0] if parameter.ndim else 1
    return rows, parameter.numel() // rows
