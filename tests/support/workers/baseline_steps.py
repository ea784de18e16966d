"""Steps of Dion and DeMo with given gradients, recorded.

Run by torchrun on 3 ranks with a method and a directory, worker j of n = 2 and 3 writes
`<n>_<j>.npz` there: what `collect` returns. The 2 workers are ranks 1 and 2, in a group.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from run import torchrun

from baselines import DeMo, Dion
from training.workers import exit_process

STEPS = 8
LR, LR_DECAY, WEIGHT_DECAY = 0.1, 0.9, 0.3
VALUES = ("float32", "bfloat16", "int8")
HIDDEN = {
    "query": (12, 20),
    "tall": (30, 8),
    "key": (12, 20),
    "late": (9, 14),  # without a gradient at first
    "small": (2, 2),  # for which Dion's factors would save nothing
    "kernel": (8, 3, 5),
    "bias": (15,),
}
SHAPES = HIDDEN | {"embedding": (10, 16)}
OPTIONS = {
    "dion": {"mu": 0.8, "rank_fraction": 0.3, "lion_lr": 0.02, "lion_betas": (0.7, 0.9)},
    "demo": {"decay": 0.9, "k": 5, "chunk": 8},
}
OTHER_COLLECTIVES = (
    *(
        "all_gather_into_tensor",
        "all_to_all",
        "all_to_all_single",
        "batch_isend_irecv",
        "broadcast",
        "gather",
    ),
    *("irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
    *("send", "all_gather_object", "all_reduce_coalesced", "broadcast_object_list"),
)


def matrix_shape(name):
    rows, *rest = SHAPES[name]
    return rows, int(np.prod(rest))


def start(name):
    """The layer at the start, as a matrix."""
    generator = np.random.default_rng([0, *name.encode()])
    return generator.normal(size=matrix_shape(name)).astype(np.float32)


def gradient(name, step, worker):
    """Of one worker: a part that all have in common, and noise."""
    if name == "late" and step < 2:
        return np.zeros(matrix_shape(name), dtype=np.float32)
    common = np.random.default_rng([1, step // 4, *name.encode()])
    own = np.random.default_rng([2, step, worker, *name.encode()])
    gradient = common.normal(size=matrix_shape(name)) + own.normal(size=matrix_shape(name))
    return gradient.astype(np.float32)


def build(method, values, process_group=None, difference=0.0):
    """Parameters by name and their optimizer. `difference` is added to layer "key"."""
    parameters = {
        name: torch.nn.Parameter(torch.from_numpy(start(name)).view(shape))
        for name, shape in SHAPES.items()
    }
    parameters["key"].data += difference
    groups = [
        {
            "name": "hidden",
            "params": [(name, parameters[name]) for name in HIDDEN],
            "weight_decay": WEIGHT_DECAY,
        },
        {"name": "embedding", "params": [("embedding", parameters["embedding"])]},
    ]
    kind = {"dion": Dion, "demo": DeMo}[method]
    options = OPTIONS[method] | {"lr": LR, "values": values, "process_group": process_group}
    return parameters, kind(groups, **options)


@contextmanager
def spy():
    """Bytes of the tensors that are handed to all-reduces and all-gathers; no others may be."""
    seen = {"reduced": 0, "gathered": 0}
    originals = {name: getattr(dist, name) for name in OTHER_COLLECTIVES}
    originals |= {"all_reduce": dist.all_reduce, "all_gather": dist.all_gather}

    def all_reduce(tensor, *arguments, **options):
        seen["reduced"] += tensor.nbytes
        return originals["all_reduce"](tensor, *arguments, **options)

    def all_gather(outputs, message, *arguments, **options):
        seen["gathered"] += message.nbytes
        return originals["all_gather"](outputs, message, *arguments, **options)

    def refuse(*arguments, **options):
        raise AssertionError("a collective that is not counted")

    try:
        for name in OTHER_COLLECTIVES:
            setattr(dist, name, refuse)
        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()


def record(method, values, worker, process_group=None):
    """STEPS steps: parameters and momentum after each, and bytes, logged and seen by the spy."""
    parameters, optimizer = build(method, values, process_group)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: LR_DECAY**step)
    recorded = {"model": [], "momentum": [], "bytes": [], "spied": []}
    states = [optimizer.state[parameter] for parameter in parameters.values()]
    factors = {
        f"right_factor {name}": state["right_factor"].numpy().copy()
        for name, state in zip(parameters, states, strict=True)
        if "right_factor" in state
    }
    with spy() as seen:
        for step in range(STEPS):
            for name, parameter in parameters.items():
                parameter.grad = torch.from_numpy(gradient(name, step, worker)).view_as(parameter)
            optimizer.step()
            scheduler.step()
            recorded["model"].append(flat(parameters.values()))
            recorded["momentum"].append(flat(state["momentum"] for state in states))
            counts = optimizer.w2s_bytes, optimizer.s2w_bytes, optimizer.wire_tx_bytes
            recorded["bytes"].append(counts)
            recorded["spied"].append((seen["reduced"], seen["gathered"]))
    optimizer.check_finite()
    return {kind: np.stack(rows) for kind, rows in recorded.items()} | factors


def collect(method, worker, process_group=None):
    """Recordings for all value formats as arrays named "values kind"."""
    return {
        f"{values} {kind}": rows
        for values in VALUES
        for kind, rows in record(method, values, worker, process_group).items()
    }


def construction_error(method, rank):
    """What building the optimizer says where the last of three ranks has another layer "key"."""
    try:
        build(method, "float32", difference=1e-3 * (rank == 2))
    except ValueError as error:
        return str(error)
    return "no error"


def collect_from_all(method, directory):
    """What all workers recorded, by the number of workers."""
    torchrun("baseline_steps.py", method, directory, ranks=3)
    return {1: [collect(method, 0)]} | {
        workers: [dict(np.load(directory / f"{workers}_{worker}.npz")) for worker in range(workers)]
        for workers in (2, 3)
    }


def main(method, directory):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    error = construction_error(method, rank)
    np.savez(directory / f"3_{rank}.npz", **collect(method, rank), error=error)
    pair = dist.new_group([1, 2])
    if rank > 0:
        np.savez(directory / f"2_{rank - 1}.npz", **collect(method, rank - 1, pair))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    exit_process(0)
