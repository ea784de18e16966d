"""What users see of an optimizer: `param_groups` and `state`, by the model's own parameters.

An optimizer steps whole copies of layers that `fully_shard` has sharded. torch finds a parameter's
name, as for a checkpoint, only for the model's own one.
"""

from collections import UserDict
from collections.abc import Mapping

from torch import Tensor


class OwnGroup(UserDict):
    """A parameter group with the model's own parameters; all other entries are those of `group`."""

    def __init__(self, group: dict, models: Mapping[Tensor, Tensor]):
        self.data, self.params = group, [models[stepped] for stepped in group["params"]]

    def __getitem__(self, key: str):
        return self.params if key == "params" else self.data[key]


def show_groups(optimizer) -> None:
    """Set `param_groups` to the groups that are stepped, with the model's own parameters."""
    groups = optimizer.wrapped.param_groups if optimizer.wrapped else optimizer.param_groups
    if optimizer.mesh and optimizer.mesh.sharded:
        models = _models(optimizer)
        groups = [one if isinstance(one, OwnGroup) else OwnGroup(one, models) for one in groups]
    optimizer.param_groups = groups


def show_state(optimizer) -> None:
    """Set `state` to views of the batches' tables, by the model's own parameters."""
    models = _models(optimizer)
    for batch in optimizer.batches:
        for stepped, tables in batch.parameter_state().items():
            optimizer.state[models.get(stepped, stepped)] = tables


def _models(optimizer) -> dict[Tensor, Tensor]:
    """Return the model's parameter by what is stepped of it, for workers of several ranks."""
    own = optimizer.mesh.own if optimizer.mesh else {}
    return {stepped: parameter for parameter, stepped in own.items()}
