"""What a run would take, computed without training: tokens, bytes, memory, and time on a link."""

from functools import partial

import torch
from omegaconf import DictConfig

from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.communicating import Communicating
from ef21_muon.layers import AUTO
from ef21_muon.transport.fixed import Transport
from ef21_muon.transport.load import MULTIPLICATIONS_PER_BYTE, dry_round
from model import GPT
from training.config import build
from training.links import LINKS
from training.method import assemble, parameter_groups, require_whole_rounds
from training.overlap import overlap
from training.report import table
from training.study import WORKERS
from training.traffic import groups_of, loads_by_placement, rounds_of_method
from training.workers import RunError

SLOWEST = next(iter(LINKS))
WEIGHED = (
    "server=auto weighs both: a byte takes as long as {cpu:,} multiplications of a CPU, or "
    "{cuda:,} of a GPU (at 100 Mbit/s)"
).format(**MULTIPLICATIONS_PER_BYTE)


def plan(config: DictConfig) -> str:
    """The tables of dry_run for EF21-Muon or local steps on 2, 4 and 8 workers.

    The model stays on the meta device. Memory is that of parameters, gradients and optimizer state
    on the rank that holds most of it, without activations and without the state of inner optimizers
    of torch. The time of a round is that of the max bytes sent per rank, at the link's rate. The
    last part is the study's map for this model.

    Raises RunError for a baseline, and for a round that is longer than the run.
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
    tokens = config.batch.global_size * model_config.context
    facts = [
        ["plan", ""],
        ["parameters", f"{model_config.parameter_count:,}"],
        ["tokens per step", f"{tokens:,}"],
        ["steps", f"{config.steps:,}"],
        ["steps per round", str(rounds_of_method(method))],
        ["tokens", f"{config.steps * tokens:,}"],
        ["tokens per parameter", f"{config.steps * tokens / model_config.parameter_count:.3g}"],
    ]
    groups = groups_of(config, model)
    rounds = _rounds(config, method, model, groups)
    tables = table(facts), rounds, _placements(method, groups)
    return "\n\n".join([*tables, *overlap(config, model)])


def _rounds(config: DictConfig, method: partial, model: GPT, groups: list[dict]) -> str:
    heading = ["workers", "w2s per round", "of float32", "s2w per round", "w2s per run"]
    rows = [[*heading, "GB per rank", *(f"s at {link}" for link in LINKS), "servers"]]
    whole = 4 * sum(parameter.numel() for group in groups for parameter in group["params"])
    rounds = rounds_of_method(method).of(config.steps - 1)[0] + 1  # the last may be shorter
    for workers in WORKERS:
        server = method.keywords.get("server", AUTO)
        if server == AUTO:
            server, *_ = loads_by_placement(method, groups, workers)
        of_ranks = [_optimizer(config, method, model, server, r, workers) for r in range(workers)]
        traffic = [dry_round(one.batches, rank, workers) for rank, one in enumerate(of_ranks)]
        most_sent = max(one.wire_tx_bytes for one in traffic)
        memory = 2 * whole + max(map(_state_bytes, of_ranks))
        w2s, s2w = traffic[0].w2s_bytes, traffic[0].s2w_bytes
        rows.append(
            [
                str(workers),
                f"{w2s:,}",
                f"{w2s / whole:.2%}",
                f"{s2w:,}",
                f"{rounds * w2s:,}",
                f"{memory / 1e9:.2f}",
                *(f"{8 * most_sent / rate:.3g}" for rate in LINKS.values()),
                server,
            ]
        )
    return table(rows)


def _placements(method: partial, groups: list[dict]) -> str:
    """The max traffic per rank in a round, and its time per step, for every placement of servers.

    If the length of rounds changes, the shortest counts.
    """
    every = min(rounds_of_method(method).lengths)
    heading = [f"max bytes per rank, {workers} workers" for workers in WORKERS]
    columns = ("multiplications", f"s per step at {SLOWEST}")
    rows = [["servers", *(cell for name in heading for cell in (name, *columns))]]
    by_workers = [loads_by_placement(method, groups, workers) for workers in WORKERS]
    for server in by_workers[0]:
        cells = [server]
        for load in (loads[server] for loads in by_workers):
            seconds = 8 * load.max_traffic / LINKS[SLOWEST] / every
            cells += [f"{load.max_traffic:,}", f"{load.max_multiplications:.2g}", f"{seconds:.3g}"]
        rows.append(cells)
    return f"{table(rows)}\n\n{WEIGHED}"


def _optimizer(
    config: DictConfig, method: partial, model: GPT, server: str, rank: int, workers: int
) -> Communicating:
    """The optimizer of a rank among so many, which sends nothing."""
    make = partial(method.func, **method.keywords | {"server": server})
    place = {"transport": Transport(rank=rank, ranks=workers), "process_group": ALONE}
    return assemble(config, make, parameter_groups(config, model), place)


def _state_bytes(optimizer: Communicating) -> int:
    of_all = [optimizer, *optimizer.inner]
    return sum(
        table.nbytes for one in of_all for state in one.state.values() for table in state.values()
    )
