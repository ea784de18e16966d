"""EF21Muon set up as the methods that it contains, recorded. The methods: ../recovered.py.

Run by torchrun with a directory, rank r writes `rank<r>.npz` there: the parameters after each step
of each case, and the server's iterate where it differs from them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ef21_muon import EF21Muon
from ef21_muon.compressors import Quantize, TopK
from ef21_muon.norms import AdaptiveRadius, BiasRMS, Euclidean, RowNorm, Sign, Spectral
from training.workers import exit_process

STEPS = 20
LR, MOMENTUM, DECAY = 0.1, 0.8, 0.5
SCION_LR, SCION_WEIGHT, RADII = 0.05, 0.2, {"head": 30.0, "bias": 2.0}
L0, L1 = 2.0, 0.5
GAMMA, ETA, FRACTION = 0.1, 0.3, 0.25
SHAPES = {"wide": (12, 20), "tall": (24, 8), "square": (10, 10), "head": (9, 14), "bias": (7, 1)}
MATRICES = ("wide", "tall", "square")
MUON = (  # scaling, nesterov, decay
    *(("muon", False, 0.0), ("muon", False, DECAY), ("muon", True, 0.0), ("muon", True, DECAY)),
    ("moonlight", True, DECAY),
)


def start(name):
    return np.random.default_rng([0, *name.encode()]).normal(size=SHAPES[name])


def gradient(model, step, worker):
    """Of sum_ij d_ij (X_ij - b_ij)^2 / 2 with the worker's own d > 0 and b, and noise of the step.

    model: {layer: array}. Returns the same in float64.
    """
    result = {}
    for name, layer in model.items():
        own = np.random.default_rng([1, worker, *name.encode()])
        curvature, minimum = own.uniform(0.5, 2, layer.shape), own.normal(size=layer.shape)
        noise = np.random.default_rng([2, worker, step, *name.encode()]).normal(size=layer.shape)
        result[name] = curvature * (layer.astype(np.float64) - minimum) + noise
    return result


def muon_cases():
    for scaling, nesterov, decay in MUON:
        norm = Spectral(scaling=scaling, dtype=torch.bfloat16)
        options = {"lr": LR, "momentum": MOMENTUM, "momentum_init": "zero"}
        rule = {"norm": norm, "nesterov": nesterov, "weight_decay": decay}
        groups = [{"params": MATRICES} | rule]
        yield f"muon {scaling} {nesterov} {decay}", (groups, options)


def scion_case(decay):
    groups = [
        {"params": MATRICES, "norm": Spectral()},
        {"params": ("head",), "norm": Sign(), "radius": RADII["head"]},
        {"params": ("bias",), "norm": BiasRMS(), "radius": RADII["bias"]},
    ]
    options = {"lr": SCION_LR, "momentum": 1 - SCION_WEIGHT, "momentum_init": "zero"}
    return groups, options | {"weight_decay": decay}


def euclidean_case(**options):
    """Steps of gradient descent: X - GAMMA G."""
    rule = {"lr": 0.5, "norm": Euclidean(), "radius": AdaptiveRadius(l0=0.5 / GAMMA, l1=0)}
    return [{"params": tuple(SHAPES)}], rule | options


GLUON_NORMS = {
    "wide": Spectral("svd"),
    "tall": Spectral("svd"),
    "square": RowNorm(),
    "head": Sign(),
    "bias": BiasRMS(),
}
SIGN_MUON = {"sign_muon none": "none", "sign_muon ef21": "ef21"}


def sign_muon_case(feedback):
    groups = [{"params": MATRICES, "norm": Spectral()}]
    options = {"lmo": "workers", "w2s": Quantize("sign@tensor"), "feedback": feedback}
    return groups, {"lr": SCION_LR, "momentum": 1 - SCION_WEIGHT, **options}


CASES = {  # groups with the names of layers for parameters, and the other options
    **dict(muon_cases()),
    "scion unconstrained": scion_case(decay=0.0),
    "scion constrained": scion_case(decay=1.0),
    "gluon": (
        [{"params": (name,), "norm": norm} for name, norm in GLUON_NORMS.items()],
        {"lr": 1.0, "momentum": 1 - ETA, "radius": AdaptiveRadius(L0, L1)},
    ),
    "ef21": euclidean_case(momentum=0, w2s=TopK(FRACTION)),
    "ef21-sgdm": euclidean_case(momentum=1 - ETA, w2s=TopK(FRACTION), first_message="full"),
    "ef21-p": euclidean_case(momentum=0, s2w=TopK(FRACTION), server="rank0"),
    **{case: sign_muon_case(feedback) for case, feedback in SIGN_MUON.items()},
}


def flat(model):
    return np.concatenate([np.ravel(layer) for layer in model.values()])


def record(case, worker):
    """(STEPS, entries) of W, and of X where s2w is lossy, with layers in the order of `SHAPES`."""
    groups, options = CASES[case]
    names = [name for name in SHAPES if any(name in group["params"] for group in groups)]
    parameters = {name: torch.nn.Parameter(torch.from_numpy(start(name)).float()) for name in names}
    groups = [
        group | {"params": [(name, parameters[name]) for name in group["params"]]}
        for group in groups
    ]
    optimizer = EF21Muon(groups, **options)
    recorded = {"W": [], "X": []}
    for step in range(STEPS):
        model = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
        for name, values in gradient(model, step, worker).items():
            parameters[name].grad = torch.from_numpy(values).float()
        optimizer.step()
        recorded["W"].append(flat(model))
        states = [optimizer.state[parameter] for parameter in parameters.values()]
        if all("server_model" in state for state in states):
            recorded["X"].append(np.concatenate([s["server_model"].flatten() for s in states]))
    return {f"{case} {kind}": np.stack(rows) for kind, rows in recorded.items() if rows}


def main(directory):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    arrays = {}
    for case in CASES:
        arrays |= record(case, rank)
    np.savez(directory / f"rank{rank}.npz", **arrays)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process(0)
