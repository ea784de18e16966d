"""The tables that a run prints: its parameter groups first, its bytes last."""

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
from training.workers import Workers


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns; the first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def facts_of(run) -> dict:
    """What the run record has beside the configuration, of a train.Run."""
    return {
        "parameters": run.raw_model.config.parameter_count,
        "world_size": place_among_all(run.config, run.workers)[1],
        "worker_size": run.config.ranks_per_worker,
        "device": run.workers.device.type,
        "placement": run.optimizer.server,
    }


def introduction(run) -> str:
    """What a train.Run is of. To be asked for by all workers."""
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
            f"\nonly the first step sends whole gradients: optimizer.refresh_every={every} is longer than "
            f"steps={run.config.steps}\n"
        )
    return text


def whole_every(optimizer: torch.optim.Optimizer) -> int:
    """The steps between those whose gradients GreedyLore sends whole; 0 for other methods."""
    return optimizer.whole_every if isinstance(optimizer, AllReduced) else 0


def group_table(optimizer: torch.optim.Optimizer, workers: Workers) -> str:
    """What a worker sends for which layers, in bytes a round; of a baseline, what it trains."""
    if not has_servers(optimizer):
        return table([["group", "tensors", "parameters", "lr", "method"], *_parameters(optimizer)])
    heading = ["group", "layers", "shape", "norm", "radius", "lr", "w2s", "bytes", "s2w", "bytes"]
    of_ranks = workers.gather(_layers(optimizer))[: ranks_of_a_worker(optimizer)]
    told = table([heading, *(row for of_rank in of_ranks for row in of_rank)])
    rounds = optimizer.rounds
    told_rounds = "a round a step" if rounds.lengths == [1] else f"a round every {rounds} steps"
    servers = workers.gather(optimizer.server)[: ranks_of_a_worker(optimizer)]  # of every rank
    told_servers = f"{' and '.join(dict.fromkeys(servers))}{_chosen(optimizer)}"
    return f"{told}\n\n{told_rounds}, servers {told_servers}"


def _chosen(optimizer: Communicating) -> str:
    """What servers take where they are, and what they would elsewhere; of server=auto."""
    loads = dict(optimizer.placements)
    if not loads:
        return ""
    own = loads.pop(optimizer.server)
    told = ", ".join(
        f"{name} {one.bytes:,} and {one.multiplications:.2g}" for name, one in loads.items()
    )
    return (
        f": the busiest ranks move {own.bytes:,} bytes and take {own.multiplications:.2g} "
        f"multiplications a round ({told})"
    )


def ranks_of_a_worker(optimizer: torch.optim.Optimizer) -> int:
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
    """What servers send back of a batch of layers, and its bytes."""
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
    """What is used, and what for: a compressor that would save no byte gives way to dense."""
    return str(used) if used is chosen else f"{used} (smaller than {chosen})"


def result_table(end: dict) -> str:
    """The end of a run: `end` is its end record."""
    sent, uncompressed = end["w2s_bytes"], end["uncompressed_bytes"]
    return table(
        [
            ["result", ""],
            ["test loss", f"{end['test_loss']:.4f}"],
            ["tokens", f"{end['tokens']:,}"],
            ["bytes sent per worker", f"{sent:,}"],
            ["uncompressed (float32)", f"{uncompressed:,}"],
            ["ratio", f"{uncompressed / sent:.1f}x fewer"],
            ["bytes received per worker", f"{end['received_bytes']:,}"],
            ["training time", f"{end['seconds']:.0f} s, {end['optimizer_share']:.0%} optimizer"],
        ]
    )
