"""What a run will take, told without training: tokens, bytes, memory, and time on a link."""

from functools import partial
from itertools import pairwise

import torch
from omegaconf import DictConfig

from ef21_muon import EF21Muon, Identity, LocalSteps
from ef21_muon.exchange.layers import LayerBatch, RoundBatch, batch_layers, serve
from ef21_muon.exchange.placement import AUTO
from ef21_muon.messages.feedback import FEEDBACK
from ef21_muon.messages.switch import in_round, starts
from model import GPT
from training.config import build
from training.links import LINKS
from training.method import require_whole_rounds
from training.overlap import overlap
from training.report import table
from training.study import WORKERS
from training.traffic import busiest_by_placement, costs_of, groups_of, rounds_of_method
from training.workers import RunError

SLOWEST = next(iter(LINKS))


def plan(config: DictConfig) -> str:
    """Tables for EF21-Muon or local steps on 2, 4 and 8 workers; the model has no values.

    Memory is of parameters, gradients and the optimizer's state of the rank that holds most of it,
    without activations and without what an inner optimizer of torch's keeps. The time of a round is
    that of the bytes which the busiest rank sends, at the link's rate. Last comes the study's map,
    for this model. Raises RunError for a baseline, and for a round longer than the run.
    """
    method = build(config.optimizer, "optimizer", _partial_=True)
    if method.func not in (EF21Muon, LocalSteps):
        raise RunError(
            "dry_run=true plans EF21-Muon and local steps: give optimizer=ef21_muon or local"
        )
    require_whole_rounds(rounds_of_method(method), config.steps)
    model_config = build(config.model, "model")
    with torch.device("meta"):
        model = GPT(model_config)
    tokens = config.batch.sequences * model_config.context
    facts = [
        ["plan", ""],
        ["parameters", f"{model_config.parameter_count:,}"],
        ["tokens a step", f"{tokens:,}"],
        ["steps", f"{config.steps:,}"],
        ["steps a round", str(rounds_of_method(method))],
        ["tokens", f"{config.steps * tokens:,}"],
        ["tokens a parameter", f"{config.steps * tokens / model_config.parameter_count:.3g}"],
    ]
    groups = groups_of(config, model)
    tables = table(facts), _rounds(config, method, groups), _placements(method, groups)
    return "\n\n".join([*tables, *overlap(config, model)])


def _rounds(config: DictConfig, method: partial, groups: list[dict]) -> str:
    heading = ["workers", "from step", "w2s a round", "of float32", "s2w a round", "w2s a run"]
    rows = [[*heading, "GB a rank", *(f"s at {link}" for link in LINKS), "servers"]]
    whole = 4 * sum(parameter.numel() for group in groups for parameter in group["params"])
    steps = rounds_of_method(method)
    rounds = steps.of(config.steps - 1)[0] + 1  # the last one may be of fewer steps
    begins = set().union(*(starts(group["w2s"]) for group in groups))
    begins = sorted(start for start in begins if start < rounds)
    for workers in WORKERS:
        server = method.keywords.get("server", AUTO)
        if server == AUTO:
            server, *_ = busiest_by_placement(method, groups, workers)
        phases = []
        for begin in begins:
            of_phase = [{**group, "w2s": in_round(group["w2s"], begin)} for group in groups]
            ranks = [_rank(method, of_phase, server, rank, workers) for rank in range(workers)]
            phases.append(ranks)
        lasting = [end - begin for begin, end in pairwise([*begins, rounds])]
        run = sum(n * ranks[0]["w2s"] for n, ranks in zip(lasting, phases, strict=True))
        for begin, ranks in zip(begins, phases, strict=True):
            busiest = max(rank["wire"] for rank in ranks)
            memory = 2 * whole + max(rank["state"] for rank in ranks)
            rows.append(
                [
                    str(workers),
                    str(steps.first_step(begin) + 1),
                    f"{ranks[0]['w2s']:,}",
                    f"{ranks[0]['w2s'] / whole:.2%}",
                    f"{ranks[0]['s2w']:,}",
                    f"{run:,}",
                    f"{memory / 1e9:.2f}",
                    *(f"{8 * busiest / rate:.3g}" for rate in LINKS.values()),
                    server,
                ]
            )
    return table(rows)


def _placements(method: partial, groups: list[dict]) -> str:
    """What the busiest rank moves in a round, and its time a step, wherever servers may be.

    Where rounds change, of the shortest.
    """
    every = min(rounds_of_method(method).lengths)
    heading = [f"busiest rank, {workers} workers" for workers in WORKERS]
    rows = [["servers", *(cell for name in heading for cell in (name, f"s a step at {SLOWEST}"))]]
    traffic = [busiest_by_placement(method, groups, workers) for workers in WORKERS]
    for server in traffic[0]:
        sizes = [of_placement[server] for of_placement in traffic]
        seconds = [8 * size / LINKS[SLOWEST] / every for size in sizes]
        cells = zip(sizes, seconds, strict=True)
        rows.append([server, *(c for size, s in cells for c in (f"{size:,}", f"{s:.3g}"))])
    return table(rows)


def _rank(
    method: partial, groups: list[dict], server: str, rank: int, workers: int
) -> dict[str, int]:
    """Bytes of one rank: a round's messages, what it sends of them, and the optimizer's state."""
    with torch.device("meta"):
        if method.func is EF21Muon:
            batches, inner = batch_layers(groups, server, rank, workers), []
        else:
            batches = serve(RoundBatch, groups, costs_of(method, groups), server, rank, workers)
            feedback = FEEDBACK[method.keywords["feedback"]]
            for batch in batches:
                batch.make_room(feedback.accumulates, method.keywords["outer_momentum"])
            inner = _inner_batches(method, groups)
    w2s = [(b, b.w2s.payload_bytes(*b.shape)) for b in batches]
    s2w = [(b, b.s2w.payload_bytes(*b.shape)) for b in batches]
    own = sum(size * (b.owned.stop - b.owned.start) for b, size in w2s)
    served = sum(size * (b.owned.stop - b.owned.start) for b, size in s2w)
    up = sum(size * len(b.names) for b, size in w2s)
    replicated = server == "replicated"
    return {
        "w2s": up,
        "s2w": 0 if replicated else sum(size * len(b.names) for b, size in s2w),
        "wire": up * (workers - 1) if replicated else up - own + served * (workers - 1),
        "state": sum(table.nbytes for b in [*batches, *inner] for _, table, _ in b.tables()),
    }


def _inner_batches(method: partial, groups: list[dict]) -> list[LayerBatch]:
    """Of EF21Muon inside local steps; torch's optimizers are not known before they step."""
    if getattr(method.keywords["inner"], "func", None) is not EF21Muon:
        return []
    whole = {"w2s": Identity(), "s2w": Identity()}
    return batch_layers([group | whole for group in groups], "rank0", 0, 1)
