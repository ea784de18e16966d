"""The method of a run: the optimizer that its configuration describes."""

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from baselines import AllReduced
from ef21_muon import EF21Muon, LocalSteps, WorkerMesh, param_groups
from ef21_muon.communicating import Communicating
from ef21_muon.transport.fixed import Transport
from ef21_muon.transport.schedule import Rounds
from training.causes import explained
from training.config import WAYS, build
from training.local_steps import build_local_steps, stepped_by
from training.workers import RunError

METHODS = (Communicating, AllReduced)  # what train.py can use
FEEDBACK = {"ef21": "EF21", "ef14": "EF14", "none": "no feedback"}  # names in figures
# Arguments of optimizers that do not come from configs/optimizer.
ELSEWHERE = {
    *("params", "norm", "radius", "w2s", "s2w", "seed"),
    *("process_group", "mesh", "buffers", "transport"),
}


def parameter_groups(config: DictConfig, model: nn.Module) -> list[dict]:
    """The model's parameter groups by role, with the norm, radius and compressors of configs/norm.

    Roles without compressors of their own take those of the configuration.
    """
    rules = {
        role: {
            entry: build(value, f"norm.{role}.{entry}")
            if isinstance(value, DictConfig) or entry in WAYS
            else value
            for entry, value in rule.items()
        }
        for role, rule in config.norm.items()
    }
    return param_groups(model, rules, roles={"blocks.*": "hidden"})  # the head is the embedding


def require_parts(config: DictConfig, model: nn.Module) -> None:
    """Raise RunError for a class of the configuration that cannot be built on this node."""
    parameter_groups(config, model)
    for key in WAYS:
        build(config[key], key)
    make = build(config.optimizer, "optimizer", _partial_=True)
    _require_arguments(make)
    if config.ranks_per_worker > 1:
        _require_several_ranks(config, make.func)


def build_optimizer(
    config: DictConfig,
    model: nn.Module,
    group: ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    transport: Callable[[type], Transport | None] = lambda method: None,
) -> torch.optim.Optimizer:
    """Build the optimizer that a configuration describes.

    Args:
        config: the configuration of the run.
        model: the model, whole or sharded.
        group: the process group of messages, None for the default group.
        mesh: the mesh of workers of several ranks.
        transport: a function from the optimizer's class to its transport, None for the usual one.

    Raises:
        RunError: for choices that contradict each other.
    """
    make = build(config.optimizer, "optimizer", _partial_=True)
    _require_arguments(make)
    groups = parameter_groups(config, model)
    place = {"transport": carrier} if (carrier := transport(make.func)) else {}
    if config.ranks_per_worker == 1:
        place["process_group"] = group
    else:
        place["mesh"] = _worker_mesh(config, groups, mesh)
    with explained("optimizer"):
        optimizer = assemble(config, make, groups, place)
    _require_accord(config, optimizer)
    return optimizer


def assemble(
    config: DictConfig, make: partial, groups: list[dict], place: dict
) -> torch.optim.Optimizer:
    """Call `make` with all arguments that do not come from configs/optimizer.

    place: the process group or mesh, and the transport if it is not the usual one.
    """
    if issubclass(make.func, LocalSteps):
        return build_local_steps(config, make, groups, place)
    if issubclass(make.func, EF21Muon):
        compressors = {way: build(config[way], way) for way in WAYS}
        return make(groups, seed=config.seed, **compressors, **place)
    seed = {} if issubclass(make.func, AllReduced) else {"seed": config.seed}
    return make([stepped_by(make.func, group) for group in groups], **seed, **place)


def _worker_mesh(config: DictConfig, groups: list[dict], mesh: DeviceMesh) -> WorkerMesh:
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    if len(parameters) < config.ranks_per_worker:
        raise RunError(
            f"ranks_per_worker={config.ranks_per_worker} leaves ranks without a layer: the model "
            f"has {len(parameters)}, give at most as many"
        )
    return WorkerMesh(parameters, mesh=mesh)


def _require_several_ranks(config: DictConfig, method: type) -> None:
    """Raise RunError for a method whose workers can only have one rank."""
    if not issubclass(method, EF21Muon | LocalSteps):
        raise RunError(
            f"ranks_per_worker={config.ranks_per_worker} needs optimizer=ef21_muon or local: "
            "set it to 1"
        )


def _require_arguments(make: partial) -> None:
    """Raise RunError for a class that is none of METHODS, and for arguments that it lacks."""
    if not (isinstance(make.func, type) and issubclass(make.func, METHODS)):
        raise RunError(
            f"optimizer._target_={make.func.__qualname__} is not allowed: give "
            "ef21_muon.EF21Muon, a class of baselines, or one derived from them"
        )
    parameters = signature(make.func).parameters
    if any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    taken = parameters.keys() - ELSEWHERE
    for key in make.keywords.keys() - taken:
        raise RunError(
            f"optimizer.{key} is not allowed: {make.func.__name__} has {', '.join(sorted(taken))}"
        )


def _require_accord(config: DictConfig, optimizer: torch.optim.Optimizer) -> None:
    if config.diagnostics_every and not has_servers(optimizer):
        raise RunError(
            f"diagnostics_every={config.diagnostics_every} needs optimizer=ef21_muon or local: "
            "baselines have no error feedback to look at; set it to 0"
        )
    if config.diagnostics_every > config.steps:
        raise RunError(
            f"diagnostics_every={config.diagnostics_every} is longer than steps={config.steps}, "
            f"which leaves no record of them: give at most {config.steps}, or 0"
        )
    reduced = isinstance(optimizer, AllReduced)
    if config.checkpoint.every and reduced and optimizer.hook == "powersgd":
        raise RunError(
            f"checkpoint.every={config.checkpoint.every} is not allowed with hook=powersgd: "
            "torch keeps its state to itself; set it to 0"
        )
    local = isinstance(optimizer, LocalSteps) and not optimizer.sync_delay
    with_estimates = type(optimizer) is EF21Muon and optimizer.feedback == "ef21"
    elastic = config.ranks_per_worker == 1 and (local or with_estimates)
    if config.resume == "elastic" and not elastic:
        raise RunError(
            f"resume=elastic is not allowed for {run_label(optimizer)}: it needs "
            "optimizer=ef21_muon with feedback=ef21, or local without sync_delay, and "
            "ranks_per_worker=1; start as many workers as before, with resume=auto"
        )
    require_whole_rounds(optimizer.rounds, config.steps)


def require_whole_rounds(rounds: Rounds, steps: int) -> None:
    """Raise RunError for rounds that are longer than the run."""
    if problem := longer_than(rounds, steps):
        raise RunError(problem)


def longer_than(rounds: Rounds, steps: int) -> str | None:
    """What to do about rounds that are longer than the steps left for them; None if none is.

    The last round of a run may be shorter: what is left at the end is sent as well.
    """
    for first, length in rounds.stretches:
        left = steps - first
        if length <= left:
            continue
        if first == 0:
            return (
                f"optimizer.sync_every={length} is longer than steps={steps}: give "
                f"optimizer.sync_every={left} or less, or steps={length} or more"
            )
        stretch = f"optimizer.sync_every has rounds of {length} steps from step {first + 1} on"
        if left <= 0:
            return (
                f"{stretch}, which steps={steps} does not reach: leave them out, or give more steps"
            )
        return (
            f"{stretch}, where steps={steps} leaves {left}: give rounds of {left} steps or fewer "
            f"there, or steps={first + length} or more"
        )
    return None


def has_servers(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer sends messages to servers. No baseline does."""
    return optimizer.server is not None and not isinstance(optimizer, AllReduced)


def run_label(
    optimizer: torch.optim.Optimizer, gather: Callable[[list], list[list]] = lambda own: [own]
) -> str:
    """The name of a run in figures: the baseline, or the compressors and options of a method.

    gather: returns the lists of all ranks of a worker, since each rank sends some of the layers.
    """
    if not has_servers(optimizer):
        return optimizer.title
    local = isinstance(optimizer, LocalSteps)
    w2s, s2w = (
        optimizer.rules[0][direction] if local else optimizer.defaults[direction]
        for direction in ("w2s", "s2w")
    )
    sent = [one for of_rank in gather(_sent(optimizer)) for one in of_rank]
    label = _name("w2s", str(w2s), sent)
    if not s2w.lossless:
        label = f"{label}, back {_name('s2w', str(s2w), sent)}"
    for group, direction, chosen in dict.fromkeys(one[:3] for one in sent):
        if chosen != str(w2s if direction == "w2s" else s2w):
            back = "back " if direction == "s2w" else ""
            label = f"{label}, {group} {back}{_name(direction, chosen, sent)}"
    if local:
        return f"{label}, {_local_label(optimizer)}"
    if optimizer.lmo == "workers":
        signs = "EF21-SignMuon" if optimizer.feedback == "ef21" else "SignMuon"
        return f"{signs}, {label}"
    options = [] if optimizer.feedback == "ef21" else [FEEDBACK[optimizer.feedback]]
    with_feedback = [group["lmo_feedback"] for group in optimizer.param_groups]
    if any(one for of_rank in gather(with_feedback) for one in of_rank):
        options.append("LMO feedback")
    if (decay := optimizer.defaults["error_decay"]) != 1:
        options.append(f"error decay {decay:g}")
    if momentum := optimizer.defaults["server_momentum"]:
        options.append(f"server momentum {momentum:g}")
    return ", ".join([label, *options])


def _sent(optimizer: Communicating) -> list[tuple[str, str, str, str]]:
    """Of each batch of this rank's layers: group, direction, compressor chosen and in use."""
    sent = []
    for batch in optimizer.batches:
        rule = optimizer.rules[batch.group]
        for direction in ("w2s", "s2w"):
            chosen = rule[direction]
            sent.append((rule["name"], direction, str(chosen), str(chosen.fit(*batch.shape))))
    return sent


def _name(direction: str, chosen: str, sent: list[tuple[str, str, str, str]]) -> str:
    """The chosen compressor, or the one that all its layers use because it sends fewer bytes."""
    used = {used for _, *one, used in sent if one == [direction, chosen]}
    return used.pop() if len(used) == 1 else chosen


def _local_label(optimizer: LocalSteps) -> str:
    """The options of local steps that are not their defaults."""
    names = {type(inner).__name__ for inner in optimizer.inner} - {"EF21Muon"}
    options = [f"sync every {optimizer.rounds}", *sorted(names)]
    if optimizer.feedback != "ef14":
        options.append(FEEDBACK[optimizer.feedback])
    if optimizer.error_decay != 1:
        options.append(f"error decay {optimizer.error_decay:g}")
    if optimizer.mean == "senders":
        options.append("mean over senders")
    if optimizer.outer_lr != 1 or optimizer.outer_momentum:
        options.append(f"outer lr {optimizer.outer_lr:g}")
        options.append(f"outer momentum {optimizer.outer_momentum:g}")
    if optimizer.sync_delay:
        options.append(f"sync delay {optimizer.sync_delay}")
    return ", ".join(options)
