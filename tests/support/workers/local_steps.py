"""Local steps on least squares that differ from worker to worker, recorded step by step.

Run by torchrun with a directory, rank r writes `rank<r>.npz` and `rank<r>.json` there: what
`collect` returns.
"""

import copy
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from workers import rounds
from workers.rounds import loss, start

from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.compressors import ChunkTopK, Identity, Quantize, TopK
from ef21_muon.norms import Spectral
from ef21_muon.values import Natural
from scripts.verification.trials import Sent
from training.workers import exit_process

# Three batches: of three layers, of one, and of one that is no matrix.
SHAPES = {name: rounds.SHAPES[name] for name in ("query", "key", "value", "wide", "bias")}
EVERY, ROUNDS, SEED = 4, 2, 5
LR, MOMENTUM = 0.05, 0.5  # of torch.optim.SGD inside
STEPS = ROUNDS * EVERY
ADAMW = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
MUON = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


def muon(named):
    """As MuLoCo has it: Muon for matrices, AdamW for the others."""
    matrices = [pair for pair in named if pair[1].ndim == 2]
    others = [pair for pair in named if pair[1].ndim != 2]
    norm = Spectral(dtype=torch.float64)
    inner = EF21Muon(matrices, **MUON, norm=norm, momentum_init="zero", process_group=ALONE)
    return [inner, torch.optim.AdamW(others, **ADAMW)]


INNER = {
    "sgd": lambda named: torch.optim.SGD(named, lr=LR, momentum=MOMENTUM),
    "adamw": lambda named: torch.optim.AdamW(named, **ADAMW),
    "muon": muon,
}
MOVED = 5  # steps after which a case of RESUMED resumes in other objects
FRACTION = 0.3
K, CHUNK = 8, 8  # 8 of 8 x 8
COMPRESSORS = {
    "identity": Identity(),
    "topk": TopK(FRACTION),
    "nearest": Quantize(Natural(rounding="nearest")),
    "statistical": Quantize("statistical4"),
    "chunks": ChunkTopK(K, CHUNK, "statistical2"),
}
NESTEROV = {"outer_lr": 0.7, "outer_momentum": 0.6}
BOTH = {"w2s": "topk", "s2w": "nearest"}
CASES = {
    "average": {},
    "sync every 1": {"sync_every": 1},
    "topk": {"w2s": "topk"},
    "both": BOTH,
    "decay": BOTH | {"error_decay": 0.8, "server": "rank0"},
    "nesterov": BOTH | NESTEROV,
    "heavy ball": BOTH | NESTEROV | {"nesterov": False, "server": "rank0"},
    "ef21": BOTH | NESTEROV | {"feedback": "ef21"},
    "none": BOTH | NESTEROV | {"feedback": "none"},
    "replicated": {"w2s": "topk", "server": "replicated"} | NESTEROV,
    "replicated ef21": {"w2s": "topk", "server": "replicated", "feedback": "ef21"},
    "streaming": BOTH | NESTEROV | {"streaming": True},
    "sync_delay": BOTH | NESTEROV | {"sync_delay": 1},
    "streaming delay": BOTH | NESTEROV | {"streaming": True, "sync_delay": 1},
    "replicated streaming delay": {
        "w2s": "topk",
        "server": "replicated",
        "streaming": True,
        "sync_delay": 3,
    }
    | NESTEROV,
    "diloco": {"inner": "adamw", "outer_lr": 0.7, "outer_momentum": 0.9, "feedback": "none"},
    "muloco": {"inner": "muon", "w2s": "statistical", "error_decay": 0.9}
    | {"outer_lr": 0.9, "outer_momentum": 0.8},
    "sparseloco": {"inner": "adamw", "w2s": "chunks", "error_decay": 0.95, "mean": "senders"},
    **{
        f"senders {server}": {"w2s": "topk", "server": server, "mean": "senders"} | NESTEROV
        for server in ("sharded", "rank0", "replicated")
    },
    "senders streaming delay": BOTH | {"mean": "senders", "streaming": True, "sync_delay": 1},
    "ef21 delay": BOTH | {"feedback": "ef21", "streaming": True, "sync_delay": 1},
}
UNFINISHED = ("both", "streaming", "streaming delay", "replicated streaming delay", "sparseloco")
RESUMED = ("diloco", "nesterov", "ef21 delay", "streaming delay", "replicated streaming delay")
RESUMED += ("sparseloco", "senders streaming delay")
# What one worker alone shows of an option, which several show together with others.
OF_ONE = ("sync every 1", "topk", "heavy ball", "none", "replicated ef21", "streaming")
OF_ONE += ("sync_delay", "both unfinished", "streaming unfinished", "sparseloco unfinished")
OF_ONE += ("diloco resumed", "streaming delay resumed", "sparseloco resumed")


def runs(ranks):
    """The names of the recordings that so many ranks make, and how."""
    names = {case: {} for case in CASES}
    names |= {f"{case} unfinished": {"steps": STEPS - 2} for case in UNFINISHED}
    names |= {f"{case} resumed": {"resumed": True} for case in RESUMED}
    return {name: how for name, how in names.items() if ranks == 1 or name not in OF_ONE}


def new(case):
    """Parameters by name and their optimizer."""
    parameters = {
        name: torch.nn.Parameter(torch.from_numpy(start(name)).view(SHAPES[name]))
        for name in SHAPES
    }
    options = {"sync_every": EVERY, "seed": SEED, "server": "sharded"} | CASES[case]
    inner = INNER[options.pop("inner", "sgd")](parameters.items())
    for direction in ("w2s", "s2w"):
        options[direction] = COMPRESSORS[options.get(direction, "identity")]
    return parameters, LocalSteps(inner, **options)


def moved(case, parameters, optimizer):
    """Other objects that resume from there."""
    others, other_optimizer = new(case)
    with torch.no_grad():
        for name, other in others.items():
            other.copy_(parameters[name])
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return others, other_optimizer


def record(case, rank, ranks, steps=STEPS, resumed=False):
    """Per step x_j, W, the optimizer's byte counts, and the bytes that were seen to leave."""
    parameters, optimizer = new(case)
    recorded = {"local": [], "global": [], "bytes": [], "seen": []}
    # What resumes is compared with what did not, whose bytes are seen.
    spy = nullcontext() if resumed else Sent(SimpleNamespace(count=ranks))
    for step in range(steps):
        if resumed and step == MOVED:
            parameters, optimizer = moved(case, parameters, optimizer)
        optimizer.zero_grad()
        loss(parameters, rank).backward()
        with spy:
            optimizer.step()
        note(recorded, parameters, optimizer, spy)
    optimizer.check_finite()
    optimizer.check_agreement()
    if steps % EVERY:
        with spy:
            optimizer.final_sync()
        note(recorded, parameters, optimizer, spy)
    layout = [
        (batch.names, batch.up.compressor.payload_bytes(*batch.shape))
        for batch in optimizer.batches
    ]
    return {kind: np.stack(rows) for kind, rows in recorded.items()}, layout


def note(recorded, parameters, optimizer, spy):
    recorded["local"].append(flat(parameters))
    with optimizer.global_params():
        recorded["global"].append(flat(parameters))
    assert np.array_equal(flat(parameters), recorded["local"][-1]), "x_j has come back"
    counts = ("w2s_bytes", "s2w_bytes", "received_bytes", "wire_tx_bytes")
    recorded["bytes"].append([getattr(optimizer, count) for count in counts])
    recorded["seen"].append(getattr(spy, "bytes", 0))


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters.values()]).numpy().copy()


def collect(rank, ranks):
    """Recordings of all cases as arrays named "case kind", and their batches."""
    arrays, layouts = {}, {}
    for name, how in runs(ranks).items():
        case = name.removesuffix(" unfinished").removesuffix(" resumed")
        recorded, layouts[name] = record(case, rank, ranks, **how)
        arrays |= {f"{name} {kind}": rows for kind, rows in recorded.items()}
    return arrays, layouts


def main(directory):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    arrays, layouts = collect(rank, dist.get_world_size())
    np.savez(directory / f"rank{rank}.npz", **arrays)
    (directory / f"rank{rank}.json").write_text(json.dumps(layouts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process(0)
