"""What of a run is in a checkpoint, and how another run goes on from it."""

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
from training.schedule import new_scheduler
from training.workers import RunError


def checkpoint_of(run) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the facts of a checkpoint of a train.Run, after a whole step."""
    config = OmegaConf.to_container(run.config, resolve=True)
    facts = {
        "config": config,
        "config_hash": _hash(config),
        "workers": run.workers.count,
        "placement": run.optimizer.server,
        "data": run.workers.gather(run.feed.batches.state_dict()),
        "round": run.optimizer.round,
        "position": run.position(),
        "fleet": run.members.fleet.state() if comes_and_goes(run.config) else None,
        **run.progress.state(),
    }
    return _tensors(run) | _generator_states(run), facts


def resume(run, checkpoints: Checkpoints, directory: Path) -> dict | None:
    """Go on as the configuration says; the facts of what it goes on from, None if it begins."""
    config, workers = run.config, run.workers
    facts = None
    if config.resume != "none":
        cut = workers.together(lambda: workers.first and cut_off(directory, checkpoints.folder))
        if newest := checkpoints.newest():
            how = go_on_elastic if config.resume == "elastic" else go_on
            facts = workers.together(lambda: how(run, newest))
            workers.say(f"{f'{cut}: ' if cut else ''}going on from {newest}\n")
        elif cut:
            workers.say(f"{cut}, and has left no checkpoint\n")
    if not comes_and_goes(config):
        return facts
    # What this worker has sent, it has sent: its log and its counts go on from where they are.
    left = as_it_was_left(config, directory)
    if left:
        position = left["position"]
        run.progress.seconds = position["seconds"]
        if "w2s_bytes" in position:
            run.progress.count_on_from(position)
    return left and (facts or {}) | left


def cut_off(directory: Path, folder: Path) -> str | None:
    """How the last start in a run directory was cut off, None if it ended by itself.

    What it has left of a checkpoint in the folder is removed.
    """
    path = directory / LOG_NAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    ended = not lines or (lines[-1].startswith(b'{"record": "end"') and lines[-1].endswith(b"}"))
    left = [path for path in own_folders(folder) if path.suffix == PARTIAL]
    remove(left)
    if left:
        return f"the last start was cut off while it wrote {left[-1].stem}"
    return None if ended else "the last start was cut off"


def go_on(run, path: Path) -> dict:
    """Continue exactly from a checkpoint of the same configuration and number of workers.

    Returns its facts. Raises RunError with the keys that differ.
    """
    facts = read_facts(path)
    require_same_config(run.config, facts["config"], path)
    if facts["workers"] != run.workers.count:
        raise RunError(
            f"{path} is of {facts['workers']} workers, this run has {run.workers.count}: start as "
            "many, or give resume=elastic"
        )
    shards = facts["config"].get("shard", False)
    if isinstance(run.optimizer, LocalSteps) and shards != run.config.fsdp:
        raise RunError(
            f"{path} has each rank's own model with shard={str(shards).lower()}: give the same"
        )
    _make_inner_state(run, path, run.workers.rank)
    states = _generator_states(run)
    load(path, _tensors(run) | states)
    for state, generator in zip(states.values(), run.optimizer.generators.values(), strict=True):
        generator.set_state(state)
    run.feed.batches.load_state_dict(facts["data"][run.workers.rank])
    _continue(run, facts)
    return facts


def go_on_elastic(run, path: Path) -> dict:
    """Continue from a checkpoint of any number of workers and any placement of the servers.

    Every new G_j is the servers' G, which keeps G the mean of all G_j; every M_j, and whatever else
    a worker has, is the mean of the saved ones. The workers' random numbers start anew. Returns the
    facts, with `resync_bytes`: what a worker needs for it. Raises RunError for a configuration that
    differs. For EF21Muon with feedback "ef21", and for LocalSteps without delay.
    """
    facts = read_facts(path)
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
    run.feed.batches.restart(facts["position"]["step"])
    _continue(run, facts)
    return facts | {"resync_bytes": resync_bytes}


def _load_mean(path: Path, names: list[str], tensor: Tensor) -> None:
    one, total = torch.empty_like(tensor), torch.zeros_like(tensor)
    for name in names:
        load(path, {name: one})
        total += one
    tensor.copy_(total / len(names))


def _tensors(run) -> dict[str, Tensor]:
    """W, and the optimizer's state by the worker or the server that holds it.

    Where a worker's own parameters are apart from W, they are part of its state, and so is that of
    the optimizer which steps them.
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
    """What an optimizer of this rank steps of every layer, by name."""
    own = run.optimizer.mesh.own if run.optimizer.mesh else {}
    return {name: own.get(one, one) for name, one in run.raw_model.named_parameters()}


def _make_inner_state(run, path: Path, worker: int) -> None:
    """Room for what a worker's inner optimizers make in their first steps."""
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
    """Counters, schedule and times of the checkpoint."""
    position = {"received_bytes": _received(facts)} | facts["position"]
    run.optimizer.go_on_after(position["step"])
    if comes_and_goes(run.config):
        run.members.fleet.load_state(facts["fleet"])
    run.progress.go_on(facts)
    run.progress.count_on_from(position)
    run.scheduler = new_scheduler(run.optimizer, run.config, position["step"])


def _received(facts: dict) -> int:
    """Bytes that a worker received up to a checkpoint of a version that did not count them."""
    position = facts["position"]
    others = facts["workers"] // facts["config"]["ranks_per_worker"] - 1
    return position["s2w_bytes"] or others * position["w2s_bytes"]


def _hash(config: dict) -> str:
    text = json.dumps(what_matters(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def require_same_config(config, saved: dict, path: Path, free: tuple[str, ...] = ()) -> None:
    """Raise RunError with what differs in a configuration that `path` was made with."""
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


def as_it_was_left(config, directory: Path) -> dict | None:
    """What a log goes on behind, of a worker that starts again without a checkpoint.

    None where there is no log of a step: one that ended before, as a worker that the others refused
    does, leaves nothing to go on from, whatever its configuration was. Raises RunError for a log of
    another configuration.
    """
    path = directory / LOG_NAME
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if not any(record.get("step") for record in map(json.loads, reversed(lines))):
        return None
    require_same_config(config, json.loads(lines[0])["config"], directory)
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
