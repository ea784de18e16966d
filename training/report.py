"""The tables that a run prints: its parameter groups first, its bytes last."""

from collections.abc import Sequence

import torch

from ef21_muon import AdaptiveRadius, Compressor, EF21Muon, Switch
from ef21_muon.messages.switch import in_round
from training.method import is_ef21
from training.workers import Workers


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns; the first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def group_table(optimizer: torch.optim.Optimizer, workers: Workers) -> str:
    """What a worker sends for which layers, in bytes a step; of a baseline, what it trains."""
    if not is_ef21(optimizer):
        return table([["group", "tensors", "parameters", "lr", "method"], *_parameters(optimizer)])
    heading = ["group", "layers", "shape", "norm", "radius", "lr", "w2s", "bytes", "s2w", "bytes"]
    of_ranks = workers.gather(_layers(optimizer))[: getattr(optimizer, "worker_size", 1)]
    return table([heading, *(row for rows in of_ranks for row in rows)])


def _parameters(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    rows = []
    for group in optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        tensors = str(len(group["params"]))
        rows.append([group["name"], tensors, f"{count:,}", f"{group['lr']:g}", optimizer.title])
    return rows


def _layers(optimizer: EF21Muon) -> list[list[str]]:
    rows = []
    for place, batch in enumerate(optimizer.batches):
        group = optimizer.param_groups[batch.group]
        layers = len(batch.params)
        rows.append(
            [
                group["name"],
                str(layers),
                "x".join(map(str, batch.shape)),
                str(group["norm"]),
                _radius(group["radius"]),
                f"{group['lr']:g}",
                *_over_phases(optimizer, place, group["w2s"]),
                _fitted(batch.s2w, group["s2w"]),
                f"{layers * batch.s2w.payload_bytes(*batch.shape):,}",
            ]
        )
    return rows


def _radius(radius: float | AdaptiveRadius) -> str:
    return str(radius) if isinstance(radius, AdaptiveRadius) else f"{radius:g}"


def _over_phases(optimizer: EF21Muon, place: int, chosen: Compressor | Switch) -> tuple[str, str]:
    """What workers send of a batch of layers, and its bytes; one after the other if it changes."""
    layers, shape = len(optimizer.batches[place].params), optimizer.batches[place].shape
    names, sizes = [], []
    for phase in optimizer.phases:
        used = phase.w2s[place]
        name = _fitted(used, in_round(chosen, phase.start))
        names.append(name + (f" from step {phase.start + 1}" if phase.start else ""))
        sizes.append(f"{layers * used.payload_bytes(*shape):,}")
    return ", ".join(names), ", ".join(sizes)


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
            ["bytes received per worker", f"{end['s2w_bytes']:,}"],
            ["training time", f"{end['seconds']:.0f} s, {end['optimizer_share']:.0%} optimizer"],
        ]
    )
