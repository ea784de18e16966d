"""Copies of optimizers that send messages: by copy.deepcopy, and by pickle."""

import copy
from typing import TYPE_CHECKING

import torch.distributed as dist

from ef21_muon import views
from ef21_muon.checks.guards import Guards
from ef21_muon.state import HOOKS

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating

# A method that schedulers wrap, parts of this process, and torch's hooks, as torch has it.
NOT_COPIED = ("step", "stragglers", "unsent", *HOOKS)


def deepcopy_of(optimizer: "Communicating", memo: dict) -> "Communicating":
    """Return a copy for these parameters, or for their copies if they are in the memo.

    It sends by the same process groups.
    """
    holders = optimizer, optimizer.transport, optimizer.buffers
    held = [value for holder in holders for value in vars(holder).values()]
    memo |= {id(group): group for group in held if isinstance(group, dist.ProcessGroup)}
    other = memo[id(optimizer)] = object.__new__(type(optimizer))
    other.__setstate__(copy.deepcopy(optimizer.__getstate__(), memo))
    return other


def values_of(optimizer: "Communicating") -> dict:
    """Return what a copy has. Raises RuntimeError within `global_params()`."""
    optimizer.require_own_parameters("a copy")
    return {name: value for name, value in vars(optimizer).items() if name not in NOT_COPIED}


def restore(optimizer: "Communicating") -> None:
    """Rebuild what a copy does not have, after its values were set."""
    views.show_state(optimizer)  # in a pickle, views of tables have become tensors of their own
    optimizer.guards = Guards(optimizer, optimizer.guards.layers)
    optimizer.resume_after(optimizer.steps)
    if optimizer.wrapped:
        optimizer.wrapped.guard(optimizer)
