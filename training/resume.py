"""What a checkpoint holds, and how a run resumes from one."""

import hashlib
import json
import re
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ef21_muon import LocalSteps
from ef21_muon.layers import SERVER
from ef21_muon.transport.shards import local
from training.checkpoint import (
    PARTIAL,
    Checkpoints,
    load,
    own_folders,
    read_facts,
    remove,
    stored_tensors,
)
from training.config import AS_BEFORE, what_matters
from training.fleet import comes_and_goes
from training.local_steps import inner_tensors
from training.records import LOG_NAME
from training.renamed import modern_config
from training.schedule import new_scheduler
from training.workers import RunError


def checkpoint_of(run) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the facts of a train.Run's checkpoint. To be called after a whole step."""
    config = OmegaConf.to_container(run.config, resolve=True)
    if isinstance(run.optimizer, LocalSteps):
        run.optimizer.unsent.steps = 0  # a checkpoint holds steps that were not sent
    facts = {
        "config": config,
        "config_hash": _hash(config),
        "workers": run.workers.count,
        "placement": run.optimizer.server,
        "data": run.workers.gather(run.batch_source.batches.state_dict()),
        "round": run.optimizer.round,
        "position": run.position(),
        "fleet": run.membership.fleet.state() if comes_and_goes(run.config) else None,
        **run.progress.state(),
    }
    return _tensors(run) | _generator_states(run), facts


def resume(run, checkpoints: Checkpoints, directory: Path) -> dict | None:
    """Resume a train.Run as its configuration says.

    Returns the facts of what it resumes from, or None if it starts anew.
    """
    config, workers = run.config, run.workers
    facts = None
    if config.resume != "none":
        cut = workers.together(lambda: workers.first and cut_off(directory, checkpoints.folder))
        if newest := checkpoints.newest():
            how = resume_elastic if config.resume == "elastic" else resume_exactly
            facts = workers.together(lambda: how(run, newest))
            workers.say(f"{f'{cut}: ' if cut else ''}resuming from {newest}\n")
        elif cut:
            workers.say(f"{cut}, and has left no checkpoint\n")
    if not comes_and_goes(config):
        return facts
    # The log and the counts of a worker continue from its last record, behind the checkpoint:
    # what it has sent since then stays sent.
    left = position_left(config, directory)
    if left:
        position = left["position"]
        run.progress.seconds = position["seconds"]
        if "w2s_bytes" in position:
            run.progress.resume_byte_counts(position)
    return left and (facts or {}) | left


def cut_off(directory: Path, folder: Path) -> str | None:
    """How the last start in a run directory was cut off, or None if it ended by itself.

    Unfinished checkpoints in the folder are removed.
    """
    path = directory / LOG_NAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    ended = not lines or (lines[-1].startswith(b'{"record": "end"') and lines[-1].endswith(b"}"))
    left = [path for path in own_folders(folder) if path.suffix == PARTIAL]
    remove(left)
    if left:
        return f"the last start was cut off while it wrote {left[-1].stem}"
    return None if ended else "the last start was cut off"


def resume_exactly(run, path: Path) -> dict:
    """Resume from a checkpoint of the same configuration and number of workers, bit for bit.

    Returns its facts. Raises RunError with the keys that differ.
    """
    facts = _facts_of(path)
    require_same_config(run.config, facts["config"], path)
    if facts["workers"] != run.workers.count:
        raise RunError(
            f"{path} is of {facts['workers']} workers, this run has {run.workers.count}: start as "
            "many, or give resume=elastic"
        )
    fsdp = facts["config"].get("fsdp", False)
    if isinstance(run.optimizer, LocalSteps) and fsdp != run.config.fsdp:
        raise RunError(
            f"{path} has each rank's own model with fsdp={str(fsdp).lower()}: give the same"
        )
    _make_inner_state(run, path, run.workers.rank)
    states = _generator_states(run)
    load(path, _tensors(run) | states)
    for state, generator in zip(states.values(), run.optimizer.generators.values(), strict=True):
        generator.set_state(state)
    run.batch_source.batches.load_state_dict(facts["data"][run.workers.rank])
    _continue(run, facts)
    return facts


def resume_elastic(run, path: Path) -> dict:
    """Resume from a checkpoint of any number of workers and any placement of the servers.

    Every new G_j is the servers' G, which keeps G the mean of all G_j. Every M_j, and all other
    state of a worker, is the mean of the saved ones. The workers' random numbers start anew. This
    works for EF21Muon with feedback="ef21", and for LocalSteps without sync_delay.

    Returns the facts, with `resync_bytes`: the bytes that a worker needs for it. Raises RunError if
    the configuration differs.
    """
    facts = _facts_of(path)
    require_same_config(run.config, facts["config"], path, free=("optimizer.server",))
    _make_inner_state(run, path, worker=0)
    tensors = _tensors(run)
    worker = f"worker.{run.workers.rank}."
    load(path, {name: tensor for name, tensor in tensors.items() if not name.startswith(worker)})
    resync_bytes = 0
    for name, tensor in tensors.items():
        if not name.startswith(worker):
            continue
        layer, _, key = name.removeprefix(worker).rpartition(".")
        if key == "gradient_estimate" and not layer.endswith(".inner"):
            load(path, {f"server.{layer}.server_gradient": tensor})
        else:
            _load_mean(path, [f"worker.{j}.{layer}.{key}" for j in range(facts["workers"])], tensor)
        resync_bytes += tensor.nbytes
    run.batch_source.batches.restart(facts["position"]["step"])
    _continue(run, facts)
    return facts | {"resync_bytes": resync_bytes}


def _facts_of(path: Path) -> dict:
    """A checkpoint's facts, with the configuration in today's names."""
    facts = read_facts(path)
    return facts | {"config": modern_config(facts["config"])}


def _load_mean(path: Path, names: list[str], tensor: Tensor) -> None:
    one, total = torch.empty_like(tensor), torch.zeros_like(tensor)
    for name in names:
        load(path, {name: one})
        total += one
    tensor.copy_(total / len(names))


def _tensors(run) -> dict[str, Tensor]:
    """W, and the optimizer's state, named after the worker or the server that holds it.

    If a worker's own parameters differ from W, they are part of its state, and so is the state of
    the inner optimizers.
    """
    worker, apart = f"worker.{run.workers.rank}", isinstance(run.optimizer, LocalSteps)
    tensors = {}
    for name, parameter in run.raw_model.named_parameters():
        if apart:
            tensors[f"{worker}.{name}.local_model"] = local(parameter.detach())
        else:
            tensors[f"parameter.{name}"] = parameter.detach()
    names = {parameter: name for name, parameter in _stepped(run).items()}
    names |= {parameter: name for name, parameter in run.raw_model.named_parameters()}
    for parameter, state in run.optimizer.state.items():
        for key, tensor in state.items():
            holder = "server" if key.startswith(SERVER) else worker
            name = f"{holder}.{names[parameter]}.{key}"
            if key == "global_params":
                name, tensor = f"parameter.{names[parameter]}", tensor.view(parameter.shape)
            tensors[name] = tensor
    for parameter, key, tensor in inner_tensors(run.optimizer):
        tensors[f"{worker}.{names[parameter]}.inner.{key}"] = tensor
    return tensors


def _stepped(run) -> dict[str, Tensor]:
    """The part of every layer that this rank's optimizer steps, by the layer's name."""
    own = run.optimizer.mesh.own if run.optimizer.mesh else {}
    return {name: own.get(one, one) for name, one in run.raw_model.named_parameters()}


def _make_inner_state(run, path: Path, worker: int) -> None:
    """Allocate the state that a worker's inner optimizers make in their first steps."""
    parameters = _stepped(run)
    for stored, metadata in stored_tensors(path).items():
        found = re.fullmatch(rf"worker\.{worker}\.(.+)\.inner\.(\w+)", stored)
        for inner in run.optimizer.inner if found else ():
            parameter = parameters[found[1]]
            if any(parameter is one for group in inner.param_groups for one in group["params"]):
                device = parameter.device if metadata.size else "cpu"
                empty = torch.empty(metadata.size, dtype=metadata.properties.dtype, device=device)
                inner.state[parameter].setdefault(found[2], empty)


def _generator_states(run) -> dict[str, Tensor]:
    return {
        f"worker.{run.workers.rank}.generator.{purpose}": generator.get_state()
        for purpose, generator in run.optimizer.generators.items()
    }


def _continue(run, facts: dict) -> None:
    """Take over the counters, the schedule and the times of the checkpoint."""
    position = {"received_bytes": _received(facts)} | facts["position"]
    run.optimizer.resume_after(position["step"])
    if comes_and_goes(run.config):
        run.membership.fleet.load_state(facts["fleet"])
    run.progress.resume(facts)
    run.progress.resume_byte_counts(position)
    run.scheduler = new_scheduler(run.optimizer, run.config, position["step"])


def _received(facts: dict) -> int:
    """The bytes that a worker had received at a checkpoint whose version did not count them."""
    position = facts["position"]
    others = facts["workers"] // facts["config"]["ranks_per_worker"] - 1
    return position["s2w_bytes"] or others * position["w2s_bytes"]


def _hash(config: dict) -> str:
    text = json.dumps(what_matters(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def require_same_config(config, saved: dict, path: Path, free: tuple[str, ...] = ()) -> None:
    """Raise RunError with what differs from the configuration that `path` was made with."""
    mine, theirs = what_matters(OmegaConf.to_container(config, resolve=True)), what_matters(saved)
    before = {key: AS_BEFORE.get(key.rpartition(".")[2]) for key in mine.keys() | theirs.keys()}
    differing = [
        f"{key}={mine.get(key, before[key])!r} (it has {theirs.get(key, before[key])!r})"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key) and key not in free
    ]
    if differing:
        raise RunError(
            f"{path} was made with another configuration: {', '.join(differing)}; "
            "give the same values, or another directory"
        )


def position_left(config, directory: Path) -> dict | None:
    """Where the log of a worker ends that starts again without a checkpoint.

    None if the log has no step, as that of a worker which the others refused: there is nothing to
    resume, whatever its configuration was. Raises RunError for a log of another configuration.
    """
    path = directory / LOG_NAME
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if not any(record.get("step") for record in map(json.loads, reversed(lines))):
        return None
    require_same_config(config, modern_config(json.loads(lines[0])["config"]), directory)
    position = next(
        (
            record
            for record in map(json.loads, reversed(lines))
            if {"step", "tokens", "seconds"} <= record.keys()
        ),
        {"step": 0, "tokens": 0, "seconds": 0.0},
    )
    size = sum(map(len, lines))
    return {"log_bytes": size, "step": position["step"], "position": position}
