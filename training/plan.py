"""What a run will take, told without training: tokens, bytes, memory, and time on a link."""

from itertools import pairwise

import torch
from omegaconf import DictConfig

from ef21_muon import EF21Muon
from ef21_muon.exchange.layers import batch_layers
from ef21_muon.messages.switch import in_round, starts
from model import GPT
from training.config import build
from training.method import parameter_groups
from training.report import table
from training.workers import RunError

LINKS = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}
WORKERS = (2, 4, 8)


def plan(config: DictConfig) -> str:
    """Tables for EF21-Muon on 2, 4 and 8 workers; the model has shapes but no values.

    Memory is of parameters, gradients and the optimizer's state of the rank that holds most of it,
    without activations. The time of a round is that of the bytes which the busiest rank sends, at
    the link's rate. Raises RunError for a baseline.
    """
    if build(config.optimizer, "optimizer", _partial_=True).func is not EF21Muon:
        raise RunError("dry_run=true plans EF21-Muon alone: give optimizer=ef21_muon")
    model_config = build(config.model, "model")
    with torch.device("meta"):
        model = GPT(model_config)
    tokens = config.batch.sequences * model_config.context
    facts = [
        ["plan", ""],
        ["parameters", f"{model_config.parameter_count:,}"],
        ["tokens a step", f"{tokens:,}"],
        ["steps", f"{config.steps:,}"],
        ["tokens", f"{config.steps * tokens:,}"],
        ["tokens a parameter", f"{config.steps * tokens / model_config.parameter_count:.3g}"],
    ]
    return f"{table(facts)}\n\n{_rounds(config, model)}"


def _rounds(config: DictConfig, model: GPT) -> str:
    heading = ["workers", "from step", "w2s a round", "of float32", "s2w a round", "w2s a run"]
    rows = [[*heading, "GB a rank", *(f"s at {link}" for link in LINKS)]]
    groups = parameter_groups(config, model)
    for group in groups:
        for direction in ("w2s", "s2w"):
            group.setdefault(direction, build(config[direction], direction))
        group["param_names"], group["params"] = zip(*group["params"], strict=True)
    whole = 4 * sum(p.numel() for p in model.parameters())
    begins = set().union(*(starts(group["w2s"]) for group in groups))
    begins = sorted(start for start in begins if start < config.steps)
    for workers in WORKERS:
        phases = []
        for begin in begins:
            of_phase = [{**group, "w2s": in_round(group["w2s"], begin)} for group in groups]
            phases.append([_rank(of_phase, config, rank, workers) for rank in range(workers)])
        lasting = [end - begin for begin, end in pairwise([*begins, config.steps])]
        run = sum(n * ranks[0]["w2s"] for n, ranks in zip(lasting, phases, strict=True))
        for begin, ranks in zip(begins, phases, strict=True):
            busiest = max(rank["wire"] for rank in ranks)
            memory = 2 * whole + max(rank["state"] for rank in ranks)
            rows.append(
                [
                    str(workers),
                    str(begin + 1),
                    f"{ranks[0]['w2s']:,}",
                    f"{ranks[0]['w2s'] / whole:.2%}",
                    f"{ranks[0]['s2w']:,}",
                    f"{run:,}",
                    f"{memory / 1e9:.2f}",
                    *(f"{8 * busiest / rate:.3g}" for rate in LINKS.values()),
                ]
            )
    return table(rows)


def _rank(groups: list[dict], config: DictConfig, rank: int, workers: int) -> dict[str, int]:
    """Bytes of one rank: a round's messages, what it sends of them, and the optimizer's state."""
    with torch.device("meta"):
        batches = batch_layers(groups, config.optimizer.server, rank, workers)
    w2s = [(b, b.w2s.payload_bytes(*b.shape)) for b in batches]
    s2w = [(b, b.s2w.payload_bytes(*b.shape)) for b in batches]
    own = sum(size * (b.owned.stop - b.owned.start) for b, size in w2s)
    served = sum(size * (b.owned.stop - b.owned.start) for b, size in s2w)
    up = sum(size * len(b.names) for b, size in w2s)
    replicated = config.optimizer.server == "replicated"
    return {
        "w2s": up,
        "s2w": 0 if replicated else sum(size * len(b.names) for b, size in s2w),
        "wire": up * (workers - 1) if replicated else up - own + served * (workers - 1),
        "state": sum(
            t.nbytes for b in batches for s in b.parameter_state().values() for t in s.values()
        ),
    }
