"""Least squares on every rank, by workers of one rank or of several; see test_hierarchy.py.

    hierarchy.py DIRECTORY RANKS_PER_WORKER [sharded]

Data are of 4 parts. With 4 ranks every rank has one, with 2 ranks each has two. Writes
DIRECTORY/rank{r}.npz: parameters and bytes for every case, and the errors of wrong choices.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps, WorkerMesh
from ef21_muon.compressors import Identity, RankK, TopK
from ef21_muon.norms import Sign, Spectral

SHAPES = {"query": (12, 20), "key": (12, 20), "value": (12, 20), "fc": (30, 12), "head": (16, 12)}
CASES = {
    "both ways": {"w2s": TopK(0.2), "s2w": TopK(0.3)},
    "rank0": {"w2s": TopK(0.2), "server": "rank0"},
    "replicated": {"w2s": Identity(), "server": "replicated"},
    "rank": {"w2s": RankK(0.2)},
    "of the head": {"w2s": TopK(0.2), "head": {"w2s": TopK(0.4)}},
    "averaged": {"w2s": {"hidden": TopK(0.2), "head": TopK(0.4)}},
    "local": {
        "sync_every": 2,
        "w2s": {"hidden": TopK(0.2), "head": TopK(0.4)},
        "outer_momentum": 0.5,
        "server": "sharded",
    },
}
CASES["local, senders"] = CASES["local"] | {"mean": "senders"}
CASES["local, streaming"] = CASES["local"] | {"streaming": True}
# What ranks with sharded parameters run of these, and a worker of all ranks, and one rank alone.
SHARDED = ("both ways", "rank", "of the head", "averaged", "local, streaming")
OF_ONE_WORKER = ("both ways", "rank0", "averaged", "local, senders")
STEPS = 4


class Layers(nn.Module):
    """The layers as a module; its output is the mean loss on some parts."""

    def __init__(self):
        super().__init__()
        for name, parameter in parameters().items():
            self.register_parameter(name, parameter)

    def forward(self, parts: range, *without: str) -> torch.Tensor:
        model = {name: p for name, p in self.named_parameters() if name not in without}
        return sum(loss(model, part) for part in parts) / len(parts)


def sharded(model: nn.Module, size: int) -> nn.Module:
    shape = dist.get_world_size() // size, size
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("worker", "rank"))["rank"]
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def loss(model: dict[str, torch.Tensor], part: int) -> torch.Tensor:
    """Half the mean square of W A - B, with A and B of this part, over all layers."""
    generator = torch.Generator().manual_seed(100 + part)
    total = torch.zeros(())
    for name, (m, n) in SHAPES.items():
        inputs = torch.randn(n, 40, generator=generator)
        targets = torch.randn(m, 40, generator=generator) + part
        if name not in model:
            continue
        total = total + (model[name] @ inputs - targets).square().mean() / 2
    return total


def groups(model: dict[str, torch.nn.Parameter], **of_head) -> list[dict]:
    hidden = [(name, p) for name, p in model.items() if name != "head"]
    return [
        {"name": "hidden", "params": hidden, "norm": Spectral()},
        {
            "name": "head",
            "params": [("head", model["head"])],
            "norm": Sign(),
            "radius": 10.0,
            **of_head,
        },
    ]


def mesh_of(layers: list[dict], size: int) -> WorkerMesh | None:
    if size == 1:
        return None
    return WorkerMesh([p for group in layers for _, p in group["params"]], size)


def muon(layers: list[dict], size: int, **options) -> EF21Muon:
    return EF21Muon(layers, mesh=mesh_of(layers, size), **options)


def local_steps(
    layers: list[dict], size: int, missing_grad: str = "error", **options
) -> LocalSteps:
    mesh = mesh_of(layers, size)
    own = mesh.share(layers) if mesh else layers
    inner = EF21Muon(own, lr=0.05, process_group=ALONE, missing_grad=missing_grad)
    return LocalSteps(inner, mesh=mesh, **options)


def averaged(layers: list[dict], size: int, **options) -> AveragedGradients:
    mesh = mesh_of(layers, size)
    inner = torch.optim.SGD(mesh.share(layers) if mesh else layers, lr=0.05, momentum=0.5)
    return AveragedGradients(inner, mesh=mesh, **options)


def train(case: str, size: int, shard: bool) -> dict[str, np.ndarray]:
    module = sharded(Layers(), size) if shard else Layers()
    model = dict(module.named_parameters())
    options = dict(CASES[case])
    layers = groups(model, **options.pop("head", {}))
    if "local" in case:
        optimizer = local_steps(layers, size, **options)
    elif case == "averaged":
        optimizer = averaged(layers, size, **options)
    else:
        optimizer = muon(layers, size, lr=0.05, **options)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = range(4)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
    for step in range(STEPS):
        if step in (0, STEPS // 2):  # as a user's own code or load_state_dict does
            with torch.no_grad():
                for parameter in model.values():
                    parameter.mul_(0.5)
        optimizer.zero_grad()
        module.zero_grad()  # of all ranks of the worker
        module(parts).backward()
        optimizer.step()
    with getattr(optimizer, "global_params", nullcontext)():
        flat = torch.cat([whole(p.detach()).flatten() for p in model.values()])
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values())
    return {
        f"{case} model": flat.numpy(),
        f"{case} bytes": [optimizer.w2s_bytes, optimizer.s2w_bytes, optimizer.wire_tx_bytes],
        f"{case} state": state,
    }


def clipped(size: int, shard: bool) -> list[float]:
    """How far a mesh is from torch's clipping of the worker's mean gradient, relative to it.

    For a norm that is never reached, one that is, and one that is with a NaN in a layer, which
    leaves the gradients of the other layers as they are.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first = rank // size * size
    parts = range(first * 4 // ranks, (first + size) * 4 // ranks)
    module, found = sharded(Layers(), size) if shard else Layers(), []
    model = dict(module.named_parameters())
    mesh = WorkerMesh(model.values(), size)
    for max_norm, broken in ((1e6, ""), (0.5, ""), (0.5, "head")):
        mesh.max_norm = max_norm
        for parameter in (*model.values(), *mesh.own.values()):
            parameter.grad = None
        module(range(rank * 4 // ranks, (rank + 1) * 4 // ranks)).backward()
        expected = parameters()
        (sum(loss(expected, part) for part in parts) / len(parts)).backward()
        assert torch.nn.utils.get_total_norm([p.grad for p in expected.values()]) > 0.5
        if broken:
            (model[broken].grad.to_local() if shard else model[broken].grad).fill_(torch.nan)
        else:
            torch.nn.utils.clip_grad_norm_(expected.values(), max_norm)
        mesh.reduce_gradients()
        errors = [
            (mesh.own[p].grad - expected[name].grad).norm() / expected[name].grad.norm()
            for name, p in model.items()
            if p in mesh.own and name != broken
        ]
        found.append(max(map(float, errors), default=0.0))
    return found


def refusals() -> list[str]:
    messages = []
    for size, of_head in ((3, {}), (0, {}), (2, {"w2s": "topk"})):
        try:
            muon(groups(parameters(), **of_head), size)
        except ValueError as error:
            messages.append(str(error))
    try:
        local_steps(groups(parameters()), 2, w2s={"hidden": TopK(0.2)})
    except ValueError as error:
        messages.append(str(error))
    return messages


def overflow(size: int) -> list[int]:
    """Rounds, and gradients that are left, after an overflow on rank 0 in every layer of others."""
    model = parameters()
    optimizer = muon(groups(model), size)
    loss(model, 0).backward()
    if dist.get_rank() == 0:
        for parameter in model.values():
            if parameter not in optimizer.mesh.own:
                parameter.grad.fill_(torch.inf)
    optimizer.found_inf = torch.zeros(())  # of this rank's own layers, as GradScaler says it
    optimizer.step()
    return [optimizer.round, sum(parameter.grad is not None for parameter in model.values())]


MISSING = ("named", "zero", "nothing", "unreduced", "continues")


def missing(shard: bool, local: bool) -> list[str]:
    """What is said of gradients that are missing on all ranks, in the order of MISSING."""

    def build(policy: str):
        module = sharded(Layers(), 2) if shard else Layers()
        layers = groups(dict(module.named_parameters()))
        make = local_steps if local else muon
        return module, make(layers, 2, missing_grad=policy)

    def step() -> str:
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        change = {n: float((whole(p.detach()) - start[n]).norm()) for n, p in parameters_of(module)}
        return " ".join(name for name, size in change.items() if size > 0)

    def parameters_of(module):
        return list(module.named_parameters())

    start = parameters()
    module, optimizer = build("error")
    module(range(2), "key", "head").backward()
    said = [step()]
    module, optimizer = build("zero")
    module(range(2), "key", "head").backward()
    said.append(step())
    start = {name: whole(p.detach()).clone() for name, p in parameters_of(module)}
    module.zero_grad()
    said.append(step())
    for reduced in (False, True):
        for micro in range(3):
            if shard:
                module.set_requires_gradient_sync(reduced and micro == 2)
            if shard or reduced:
                module(range(micro, micro + 1)).backward()
        said.append(step())
    optimizer.check_agreement()
    return said


def diverged(shard: bool) -> str:
    """What a check says of two workers, each of whose ranks have changed their model alike."""
    module = sharded(Layers(), 2) if shard else Layers()
    model = dict(module.named_parameters())
    optimizer = muon(groups(model), 2)
    with torch.no_grad():
        for parameter in model.values():
            parameter.mul_(1 + dist.get_rank() // 2)
    try:
        optimizer.check_agreement()
    except ValueError as error:
        return str(error)
    return "no error"


def scaled_shards() -> str:
    module = sharded(Layers(), 2)
    optimizer = muon(groups(dict(module.named_parameters())), 2)
    module(range(2)).backward()
    optimizer.found_inf = 0  # what GradScaler makes of no gradients
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def refusals_of_shards() -> list[str]:
    """Of two workers of two ranks, and of one of four."""
    of_two, of_all = sharded(Layers(), 2), sharded(Layers(), 4)
    flat = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "rank"))
    of_both = fully_shard(Layers(), mesh=flat)
    in_columns = {
        name: nn.Parameter(distribute_tensor(p.detach(), flat["rank"], [Shard(1)]))
        for name, p in parameters().items()
    }
    mixed = {**dict(of_two.named_parameters()), "head": parameters()["head"]}
    without_values = {name: nn.Parameter(p.to("meta")) for name, p in parameters().items()}
    first_fsdp = FullyShardedDataParallel(Layers(), device_id=torch.device("cpu"))
    attempts = [
        lambda: EF21Muon(groups(dict(of_two.named_parameters()))),
        lambda: (
            torch.optim.AdamW(of_two.parameters())
            and LocalSteps(torch.optim.AdamW(of_two.parameters()))
        ),
        *(
            lambda model=model: muon(groups(model), 2)
            for model in (
                dict(of_all.named_parameters()),
                dict(of_both.named_parameters()),
                in_columns,
                mixed,
            )
        ),
        lambda: EF21Muon(groups(without_values)),
        lambda: EF21Muon(first_fsdp.parameters()),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("none")
        except ValueError as error:
            messages.append(str(error))
    return messages


def main() -> None:
    dist.init_process_group("gloo")
    size, shard = int(sys.argv[2]), "sharded" in sys.argv
    refused = refusals() if dist.get_world_size() > 1 else []
    results = {"refusals": [*refused, *(refusals_of_shards() if shard else [])]}
    if size > 1:
        results["clipped"] = clipped(size, shard)
    if size == 2:
        results["diverged"] = diverged(shard)
        for local in (False, True):
            results[f"missing {local}"] = missing(shard, local)
        results["overflow"] = scaled_shards() if shard else overflow(size)
    one_worker = size == dist.get_world_size()
    for case in OF_ONE_WORKER if one_worker else SHARDED if shard else CASES:
        results |= train(case, size, shard)
    np.savez(Path(sys.argv[1]) / f"rank{dist.get_rank()}.npz", **results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
