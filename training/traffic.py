"""What a configuration sends: its groups of layers, its rounds, the max traffic per rank."""

from functools import partial

import torch
from omegaconf import DictConfig

from ef21_muon import EF21Muon
from ef21_muon.layers import entry_counts, lmo_costs
from ef21_muon.transport.load import Load, loads
from ef21_muon.transport.schedule import Rounds
from model import GPT
from training.config import build
from training.method import parameter_groups


def groups_of(config: DictConfig, model: GPT) -> list[dict]:
    """The model's groups as an optimizer has them: each with its params, their names, w2s and s2w.

    The model may be on the meta device.
    """
    groups = parameter_groups(config, model)
    for group in groups:
        for direction in ("w2s", "s2w"):
            group.setdefault(direction, build(config[direction], direction))
        group["param_names"], group["params"] = zip(*group["params"], strict=True)
    return groups


def rounds_of_method(method: partial) -> Rounds:
    """The rounds of a method: EF21Muon has one per step, LocalSteps one per `sync_every` steps."""
    return Rounds(method.keywords.get("sync_every", 1))


def costs_of(method: partial, groups: list[dict]) -> list[int]:
    """The cost of each layer on its owner rank, which the assignment of layers balances."""
    return lmo_costs(groups) if method.func is EF21Muon else entry_counts(groups)


def loads_by_placement(method: partial, groups: list[dict], workers: int) -> dict[str, Load]:
    """The max load per rank in a round, by placement. The first one is what server=auto takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where a run on this machine would be
    return loads(groups, costs_of(method, groups), workers, device)
