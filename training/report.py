"""The tables that a run prints: its parameter groups first, its traffic last."""

from collections.abc import Sequence

import torch

from baselines import AllReduced
from ef21_muon import LocalSteps
from ef21_muon.communicating import Communicating
from ef21_muon.compressors import Compressor
from ef21_muon.layers import Batch
from ef21_muon.norms import AdaptiveRadius
from training.fleet import comes_and_goes, place_among_all
from training.method import has_servers
from training.records import both_ways, megabytes, ratio
from training.workers import Workers


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns. The first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def run_facts(run) -> dict:
    """The facts of a train.Run that its run record has beside the configuration."""
    return {
        "parameters": run.raw_model.config.parameter_count,
        "world_size": place_among_all(run.config, run.workers)[1],
        "worker_size": run.config.ranks_per_worker,
        "device": run.workers.device.type,
        "placement": run.optimizer.server,
    }


def introduction(run) -> str:
    """Workers, model and parameter groups of a train.Run. All workers have to call this."""
    ranks, ranks_per_worker = run.workers.count, run.config.ranks_per_worker
    workers = f"{ranks // ranks_per_worker} workers"
    if comes_and_goes(run.config):
        own = run.config.membership
        workers = f"worker {own.worker} of up to {own.workers}"
    workers += f" of {ranks_per_worker} ranks" if ranks_per_worker > 1 else ""
    parameters = f"{run.raw_model.config.parameter_count:,} parameters"
    groups = group_table(run.optimizer, run.workers)
    text = f"{workers} on {run.workers.device.type}, {parameters}\n\n{groups}\n"
    if (every := whole_every(run.optimizer)) > run.config.steps:
        text += (
            f"\nonly the first step sends whole gradients: optimizer.refresh_every={every} is "
            f"longer than steps={run.config.steps}\n"
        )
    return text


def whole_every(optimizer: torch.optim.Optimizer) -> int:
    """The steps between whole gradients of GreedyLore; 0 for other methods."""
    return optimizer.whole_every if isinstance(optimizer, AllReduced) else 0


def group_table(optimizer: torch.optim.Optimizer, workers: Workers) -> str:
    """What a worker sends for each batch of layers, in bytes per round; a baseline's parameters."""
    if not has_servers(optimizer):
        return table([["group", "tensors", "parameters", "lr", "method"], *_parameters(optimizer)])
    heading = ["group", "layers", "shape", "norm", "radius", "lr", "w2s", "bytes", "s2w", "bytes"]
    by_rank = workers.gather(_layers(optimizer))[: ranks_per_worker(optimizer)]
    layers = table([heading, *(row for rows in by_rank for row in rows)])
    rounds = optimizer.rounds
    rounds = "one round per step" if rounds.lengths == [1] else f"one round per {rounds} steps"
    servers = workers.gather(optimizer.server)[: ranks_per_worker(optimizer)]
    placement = f"{' and '.join(dict.fromkeys(servers))}{_loads(optimizer)}"
    return f"{layers}\n\n{rounds}, servers {placement}"


def _loads(optimizer: Communicating) -> str:
    """With server=auto, the load of the placement that was chosen, and of the others."""
    loads = dict(optimizer.placements)
    if not loads:
        return ""
    own = loads.pop(optimizer.server)
    others = ", ".join(
        f"{name} {one.max_traffic:,} and {one.max_multiplications:.2g}"
        for name, one in loads.items()
    )
    return (
        f": per round, max traffic per rank {own.max_traffic:,} bytes, max multiplications per "
        f"rank {own.max_multiplications:.2g} ({others})"
    )


def ranks_per_worker(optimizer: torch.optim.Optimizer) -> int:
    return optimizer.mesh.ranks_per_worker if optimizer.mesh else 1


def _parameters(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    rows = []
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        tensors = str(len(group["params"]))
        rows.append([group["name"], tensors, f"{count:,}", f"{group['lr']:g}", optimizer.title])
    return rows


def _layers(optimizer: Communicating) -> list[list[str]]:
    rows = []
    for batch in optimizer.batches:
        group, rule = optimizer.param_groups[batch.group], optimizer.rules[batch.group]
        layers, fitted = len(batch.params), rule["w2s"].fit(*batch.shape)
        rows.append(
            [
                group["name"],
                str(layers),
                "x".join(map(str, batch.shape)),
                str(group["norm"]) if "norm" in group else _inner(optimizer, batch.group),
                _radius(group["radius"]) if "radius" in group else "",
                f"{group['lr']:g}",
                _fitted(fitted, rule["w2s"]),
                f"{layers * fitted.payload_bytes(*batch.shape):,}",
                *_back(optimizer, batch, rule["s2w"]),
            ]
        )
    return rows


def _back(optimizer: Communicating, batch: Batch, chosen: Compressor) -> tuple[str, str]:
    """What servers send back for a batch of layers, and its bytes."""
    others = optimizer.transport.ranks > 1 or optimizer.transport.heals
    if batch.replicated and others:
        return "nothing", "0"
    return _fitted(batch.down.compressor, chosen), f"{len(batch.params) * batch.down.size:,}"


def _radius(radius: float | AdaptiveRadius) -> str:
    return str(radius) if isinstance(radius, AdaptiveRadius) else f"{radius:g}"


def _inner(optimizer: LocalSteps, group: int) -> str:
    """The name of the inner optimizer that steps a group without a norm."""
    of_groups = [inner for inner in optimizer.inner for _ in inner.param_groups]
    return type(of_groups[group]).__name__


def _fitted(used: Compressor, chosen: Compressor) -> str:
    """The compressor in use; with the chosen one if that would send no fewer bytes."""
    return str(used) if used is chosen else f"{used} (smaller than {chosen})"


def result_table(end: dict) -> str:
    """The result of a run, from its end record."""
    uncompressed = both_ways(end["uncompressed_bytes"])
    return table(
        [
            ["result", ""],
            ["test loss", f"{end['test_loss']:.4f}"],
            ["tokens", f"{end['tokens']:,}"],
            ["sent per worker", megabytes(end["w2s_bytes"], exactly=True)],
            ["received per worker", megabytes(end["received_bytes"], exactly=True)],
            ["uncompressed float32, both ways", megabytes(uncompressed, exactly=True)],
            ["ratio, both ways", ratio(end, uncompressed)],
            ["training time", f"{end['seconds']:.0f} s, {end['optimizer_share']:.0%} optimizer"],
        ]
    )
