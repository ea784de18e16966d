"""The method of a run: the optimizer that its configuration describes."""

from functools import partial

import torch
from omegaconf import DictConfig
from torch import nn

from baselines import AllReduced
from ef21_muon import EF21Muon, HierarchicalEF21Muon, param_groups
from training.config import build
from training.workers import RunError


def parameter_groups(config: DictConfig, model: nn.Module) -> list[dict]:
    """The model's parameters by role, with the norm and the radius that configs/norm gives it."""
    rules = {
        role: {
            "norm": build(rule.norm, f"norm.{role}.norm"),
            "radius": build(rule.radius, f"norm.{role}.radius")
            if isinstance(rule.radius, DictConfig)
            else rule.radius,
        }
        for role, rule in config.norm.items()
    }
    return param_groups(model, rules, roles={"blocks.*": "hidden"})  # the head is the embedding


def build_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all workers. Raises RunError for choices that contradict one another."""
    make = build(config.optimizer, "optimizer", _partial_=True)
    groups = parameter_groups(config, model)
    options = {}
    if not issubclass(make.func, EF21Muon):
        groups = [{"name": group["name"], "params": group["params"]} for group in groups]
    if not issubclass(make.func, AllReduced):
        options["seed"] = config.seed
    if make.func is EF21Muon:
        options |= {"w2s": build(config.w2s, "w2s"), "s2w": build(config.s2w, "s2w")}
        if config.worker_size > 1:
            make = partial(HierarchicalEF21Muon, **make.keywords, worker_size=config.worker_size)
    elif config.worker_size > 1:
        raise RunError(f"worker_size={config.worker_size} needs optimizer=ef21_muon: set it to 1")
    return make(groups, **options)


def is_ef21(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is the method itself, and not a baseline, one of which builds on its step."""
    return type(optimizer) in (EF21Muon, HierarchicalEF21Muon)


def run_label(optimizer: torch.optim.Optimizer) -> str:
    """The run's name in figures: the method, or what EF21-Muon sends."""
    if not is_ef21(optimizer):
        return optimizer.title
    w2s, s2w = optimizer.defaults["w2s"], optimizer.defaults["s2w"]
    label = str(w2s) if s2w.lossless else f"{w2s}, back {s2w}"
    feedback = optimizer.feedback.title
    return label if feedback == "EF21" else f"{label}, {feedback}"
