"""What users and torch see of an optimizer: `param_groups` and `state`, by the model's parameters.

An optimizer steps whole copies of layers that `fully_shard` has sharded. For a checkpoint, torch
finds the names of the model's own parameters alone.
"""

import sys
from collections import UserDict
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating

CHECKPOINTS = "torch.distributed.checkpoint.state_dict"


class OwnGroup(UserDict):
    """A parameter group with the model's own parameters; all other entries are those of `group`."""

    def __init__(self, group: dict, models: Mapping[Tensor, Tensor]):
        self.data, self.params = group, [models[stepped] for stepped in group["params"]]

    def __getitem__(self, key: str) -> object:
        return self.params if key == "params" else self.data[key]


def show_groups(optimizer: "Communicating") -> None:
    """Set `param_groups` to the groups that are stepped, with the model's own parameters."""
    groups = optimizer.wrapped.param_groups if optimizer.wrapped else optimizer.param_groups
    if optimizer.mesh and optimizer.mesh.sharded:
        models = _models(optimizer)
        shown = [one if isinstance(one, OwnGroup) else OwnGroup(one, models) for one in groups]
        groups = cast(list[dict[str, Any]], shown)
    optimizer.param_groups = groups


def show_state(optimizer: "Communicating") -> None:
    """Set `state` to views of the batches' tables, by the model's own parameters."""
    models = _models(optimizer)
    for batch in optimizer.batches:
        for stepped, tables in batch.parameter_state().items():
            optimizer.state[models.get(stepped, stepped)] = tables


def _models(optimizer: "Communicating") -> dict[Tensor, Tensor]:
    """Return the model's parameter by what is stepped of it, for workers of several ranks."""
    own = optimizer.mesh.own if optimizer.mesh else {}
    return {stepped: parameter for parameter, stepped in own.items()}


def asked_for(option: str) -> bool:
    """Return whether torch's functions for checkpoints call this, with such an option set.

    They change and drop parts of a state by options that they do not hand on, so they are looked
    for among the callers.
    """
    frame: FrameType | None = sys._getframe()
    while frame := frame and frame.f_back:
        if frame.f_globals.get("__name__") == CHECKPOINTS and "info" in frame.f_locals:
            return getattr(frame.f_locals["info"], option, False)
    return False
