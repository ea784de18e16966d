"""Rounds of EF21Muon on least squares that differ from worker to worker, recorded.

Run by torchrun with a directory, rank r writes `rank<r>.npz` and `rank<r>.json` there: what
`collect` returns, and the errors of DIFFERENCES.
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ef21_muon import EF21Muon
from ef21_muon.compressors import Identity, Quantize, QuantizedRank, RankK, TopK
from ef21_muon.layers import PLACEMENTS
from ef21_muon.norms import Sign
from ef21_muon.values import Natural
from training.workers import exit_process

ROUNDS = 4
LR, DECAY, BETA, SEED = 1.0, 0.9, 0.3, 11
HEAD_RADIUS = 3.0
FRACTION = 0.3
SHAPES = {
    "query": (12, 20),
    "output": (20, 12),
    "key": (12, 20),
    "wide": (6, 40),
    "bias": (15,),
    "kernel": (8, 3, 5),
    "value": (12, 20),
    "head": (10, 16),
}
FEW_LAYERS = ("head", "wide")

NEAREST = Natural(rounding="nearest")
COMPRESSORS = {
    "identity": Identity(),
    "nearest": Quantize(NEAREST),
    "topk": TopK(FRACTION),
    "topk nearest": TopK(FRACTION, NEAREST),
    "rank": RankK(FRACTION),
    "rank nearest": RankK(FRACTION, NEAREST),
    "natural": Quantize("natural"),
    "rank natural": RankK(FRACTION, "natural"),
    "quantized": QuantizedRank(FRACTION),
}
PAIRS = [  # w2s, s2w
    ("identity", "identity"),
    ("topk", "identity"),
    ("rank", "identity"),
    ("nearest", "nearest"),
    ("rank nearest", "rank"),
    ("topk nearest", "rank nearest"),
    ("rank", "topk nearest"),
]
STOCHASTIC_PAIRS = [(name, "identity") for name in ("natural", "rank natural", "quantized")]
SETUPS = {server: {"server": server} for server in PLACEMENTS}
SETUPS["unbucketed"] = {"server": "sharded", "buckets": 1}
SERVED = {"error_decay": 0.9, "server_momentum": 0.7}
OF_SERVED = ("topk", "identity")
DIFFERENCES = ("larger", "swapped")
OTHER_GROUPS = {"lr": {"lr": 0.5}, "radius": {"radius": 2.0}, "nesterov": {"nesterov": True}}
SCALED = {
    "scaled": {"steps": 3},
    "skipped": {"steps": 4, "overflow_in": 3},
    "plain": {"steps": 3, "scaled": False},
}


def pairs_of(setup):
    """The compressors that go with it: all with sharded servers, some with the others.

    Nothing is sent back to compress where all serve all.
    """
    return {
        "sharded": PAIRS + STOCHASTIC_PAIRS,
        "rank0": [PAIRS[0], PAIRS[5], STOCHASTIC_PAIRS[2]],
        "replicated": [PAIRS[0], PAIRS[2], STOCHASTIC_PAIRS[1]],
        "unbucketed": [PAIRS[0], PAIRS[4], PAIRS[6]],
    }[setup]


def matrix_shape(name):
    rows, *rest = SHAPES[name]
    return rows, int(np.prod(rest))


def head_pair(pair):
    """The head's compressors where the other layers have `pair`.

    Its step is a sign: all of one size, so that TopK's choice among them is arbitrary, and where
    rounded messages of several workers cancel, the sign of a rounding error.
    """
    return pair if pair == ("identity", "identity") else ("topk", "identity")


def start(name):
    """The layer at the start, as a matrix."""
    rows, columns = matrix_shape(name)
    generator = np.random.default_rng([0, *name.encode()])
    return (generator.normal(size=(rows, columns)) / 6).astype(np.float32)


@cache
def least_squares(name, worker):
    """A, B of worker j's loss ||W A - B||^2 / (2 samples) of one layer."""
    rows, columns = matrix_shape(name)
    generator = np.random.default_rng([1, worker, *name.encode()])
    inputs = generator.normal(size=(columns, 2 * columns)).astype(np.float32)
    return inputs, generator.normal(scale=30, size=(rows, 2 * columns)).astype(np.float32)


def loss(parameters, worker):
    total = 0
    for name, parameter in parameters.items():
        inputs, targets = (torch.from_numpy(x) for x in least_squares(name, worker))
        residual = parameter.view(matrix_shape(name)) @ inputs - targets
        total += residual.square().sum() / (2 * inputs.shape[1])
    return total


def build(names, pair=PAIRS[0], setup="rank0", differing=lambda matrix: matrix):
    """Parameters and optimizer. `differing` changes layer "key"."""
    matrices = {name: torch.from_numpy(start(name)) for name in names}
    if "key" in matrices:
        matrices["key"] = differing(matrices["key"])
    parameters = {
        name: torch.nn.Parameter(matrix.view(SHAPES[name])) for name, matrix in matrices.items()
    }
    body = [(name, parameter) for name, parameter in parameters.items() if name != "head"]
    head = {
        "params": [("head", parameters["head"])],
        "norm": Sign(),
        "radius": HEAD_RADIUS,
        "w2s": COMPRESSORS[head_pair(pair)[0]],
        "s2w": COMPRESSORS[head_pair(pair)[1]],
    }
    optimizer = EF21Muon(
        [{"params": body}, head],
        lr=LR,
        momentum=1 - BETA,
        w2s=COMPRESSORS[pair[0]],
        s2w=COMPRESSORS[pair[1]],
        seed=SEED,
        **(SETUPS | {"served": {"feedback": "ef14", **SERVED}})[setup],
    )
    return parameters, optimizer


def record(pair, setup, workers, names=tuple(SHAPES)):
    """ROUNDS rounds in which this rank minimises the mean loss of `workers`.

    Returns (ROUNDS, entries) arrays of W, G_j and G, layer after layer, with NaN in G for layers
    that another rank serves; and, for every batch, (names, owners' counts).
    """
    parameters, optimizer = build(names, pair, setup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: DECAY**step)
    recorded = {"model": [], "estimate": [], "server": []}
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        (sum(loss(parameters, worker) for worker in workers) / len(workers)).backward()
        optimizer.step()
        scheduler.step()
        states = [optimizer.state[parameter] for parameter in parameters.values()]
        recorded["model"].append(_flat(parameters.values()))
        recorded["estimate"].append(_flat(state["gradient_estimate"] for state in states))
        not_served = [torch.full_like(parameter, torch.nan) for parameter in parameters.values()]
        served = zip(states, not_served, strict=True)
        recorded["server"].append(_flat(s.get("server_gradient", nan) for s, nan in served))
    optimizer.check_finite()
    layout = [
        (batch.names, [part.stop - part.start for part in batch.owned_by])
        for batch in optimizer.batches
    ]
    return {kind: np.stack(rows) for kind, rows in recorded.items()}, layout


def _flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()


def construction_error(difference, rank):
    """What building the optimizer says where the last rank's layer "key" differs."""

    def differing(matrix):
        if rank == dist.get_world_size() - 1 and difference == "larger":
            matrix[0, 0] += 1e-3
        if rank == dist.get_world_size() - 1 and difference == "swapped":
            matrix[0, :2] = matrix[0, :2].flip(0)
        return matrix

    try:
        build(SHAPES, differing=differing)
    except ValueError as error:
        return str(error)
    return "no error"


def agreement_error(**entries):
    """What the check says where the last rank's first group has other entries."""
    _, optimizer = build(SHAPES)
    if dist.get_rank() == dist.get_world_size() - 1:
        optimizer.param_groups[0].update(entries)
    try:
        optimizer.check_agreement()
    except ValueError as error:
        return str(error)
    return "no error"


def go_on_from_states():
    """Rounds that go on in other objects, from all ranks' states; and what else is said of states.

    Returns parameters of both, and what loading rank 0's state and a part of one's own says.
    """
    pair = ("topk", "topk")
    parameters, optimizer = build(SHAPES, pair, "sharded")
    others, other = build(SHAPES, pair, "sharded")

    def take(parameters, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            loss(parameters, dist.get_rank()).backward()
            optimizer.step()

    take(parameters, optimizer)
    box = [optimizer.full_state_dict()]
    dist.broadcast_object_list(box)
    said = []
    a_part = {key: one for key, one in other.state_dict().items() if key == "param_groups"}
    for state in (box[0]["ranks"][0], a_part | {"state": {}}):
        before = other.state_dict()
        try:
            other.load_state_dict(state)
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
            assert str(before) == str(other.state_dict()), "nothing has changed"
    with torch.no_grad():
        torch._foreach_copy_(list(others.values()), list(parameters.values()))
    other.load_state_dict(box[0])
    take(parameters, optimizer)
    take(others, other)
    return _flat(parameters.values()), _flat(others.values()), said


def step_error(parameters, optimizer, model=None):
    """What its first step says, after a backward of the model or of this rank's loss."""
    (loss(parameters, dist.get_rank()) if model is None else model()).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


class Layers(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.layers = torch.nn.ParameterDict(parameters)

    def forward(self):
        return loss(self.layers, dist.get_rank())


def error_in_ddp():
    """Where the model is in DistributedDataParallel, as others put it there."""
    parameters, optimizer = build(SHAPES)
    wrapped = torch.nn.parallel.DistributedDataParallel(Layers(parameters))
    return step_error(parameters, optimizer, wrapped)


def scaled_steps(steps, scaled=True, overflow_in=None):
    """Rounds under a GradScaler, in one of which the last rank's gradient overflows, or in none.

    Returns the parameters and the number of rounds.
    """
    parameters, optimizer = build(SHAPES, ("topk", "identity"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss(parameters, rank)).backward()
        if step == overflow_in and rank == last:
            parameters["wide"].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    optimizer.check_finite()
    optimizer.check_agreement()
    return _flat(parameters.values()), optimizer.round


def collect(rank):
    """Recordings of all cases as arrays named "setup w2s/s2w kind", and the batches' layouts."""
    arrays, layouts = {}, {}
    for setup in SETUPS:
        for pair in pairs_of(setup):
            case = f"{setup} {'/'.join(pair)}"
            recorded, layouts[case] = record(pair, setup, [rank])
            arrays |= {f"{case} {kind}": rows for kind, rows in recorded.items()}
        recorded, _ = record(PAIRS[0], setup, [rank], FEW_LAYERS)
        arrays |= {f"{setup} few {kind}": rows for kind, rows in recorded.items()}
    recorded, _ = record(OF_SERVED, "served", [rank])
    arrays["served model"] = recorded["model"]
    return arrays, layouts


def main(directory):
    too_early = build(SHAPES)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    arrays, layouts = collect(rank)
    for name, how in SCALED.items():
        model, rounds = scaled_steps(**how)
        arrays |= {f"{name} parameters": model, f"{name} rounds": rounds}
    *models, said = go_on_from_states()
    arrays |= dict(zip(("went on", "loaded"), models, strict=True))
    np.savez(directory / f"rank{rank}.npz", **arrays)
    errors = {difference: construction_error(difference, rank) for difference in DIFFERENCES}
    errors |= {name: agreement_error(**entries) for name, entries in OTHER_GROUPS.items()}
    errors |= dict(zip(("rank 0's state", "a part of it"), said, strict=True))
    errors |= {"too early": step_error(*too_early), "in DDP": error_in_ddp()}
    report = {"layouts": layouts, "errors": errors}
    (directory / f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process(0)
