"""What a WorkerMesh does with gradients and parameters of all kinds; see test_mesh.py.

    mesh.py DIRECTORY RANKS_PER_WORKER

Writes DIRECTORY/rank{r}.pt: a result for every case.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from newer_torch import OTHER_TYPES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from ef21_muon.checks.guards import bring_gradients
from ef21_muon.layers import Layer
from ef21_muon.transport import mesh as meshes
from ef21_muon.transport.mesh import WorkerMesh, new_mesh
from ef21_muon.transport.shards import local

SHAPES = {  # the first is cut where it is whole; some ranks have no rows of the last ones
    "embedding": (90, 8),
    "query": (12, 20),
    "kernel": (6, 4, 3, 3),
    "half": (10, 6),
    "vector": (7,),
    "few": (1, 30),
    "four": (4, 5),
}
PARTS = 4  # of the model are sent at once
COLLECTIVES = ("all_to_all_single", "all_reduce", "all_gather_object", "reduce", "broadcast")
STEPS = 3
SENDS = "all_to_all_single"


def values(name: str, *numbers: int) -> Tensor:
    """Of a layer's shape, type and strides, other ones for other numbers."""
    seed = hash((tuple(SHAPES).index(name), *numbers)) % 2**31
    drawn = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))
    if name == "half":
        return drawn.bfloat16()
    return drawn.to(memory_format=torch.channels_last) if name == "kernel" else drawn


def of_rows(tensor: Tensor, mesh) -> Tensor:
    return distribute_tensor(tensor, mesh["rank"], [Shard(0)], src_data_rank=None)


class Case:
    """Layers, whole or sharded, and their mesh; gradients are other ones on every rank."""

    def __init__(self, shard: bool):
        size = int(sys.argv[2])
        device_mesh = init_device_mesh("cpu", (dist.get_world_size() // size, size),
                                       mesh_dim_names=("worker", "rank"))  # fmt: skip
        self.layers = {name: Parameter(values(name)) for name in SHAPES}
        if shard:
            self.layers = {n: Parameter(of_rows(p, device_mesh)) for n, p in self.layers.items()}
            self.mesh = WorkerMesh(self.layers.values(), mesh=device_mesh)
        else:
            self.mesh = WorkerMesh(self.layers.values(), size)
        self.shard, self.device_mesh = shard, device_mesh
        self.ranks = dist.get_process_group_ranks(self.mesh.worker)
        self.own = {n: self.mesh.own[p] for n, p in self.layers.items() if p in self.mesh.own}

    def bring_gradients(self) -> None:
        """Of shards rows of what is the same on all ranks, as fully_shard leaves them."""
        for name, p in self.layers.items():
            if self.shard:
                p.grad = of_rows(values(name, 1, self.ranks[0]), self.device_mesh)
            else:
                p.grad = values(name, 1, dist.get_rank())

    def mean(self, name: str) -> Tensor:
        if self.shard:
            return values(name, 1, self.ranks[0])
        total = values(name, 1, self.ranks[0])
        for rank in self.ranks[1:]:
            total = total + values(name, 1, rank)
        return total / len(self.ranks)

    def step(self) -> None:
        self.bring_gradients()
        self.mesh.reduce_gradients()
        with torch.no_grad():
            for name, one in self.own.items():
                one.copy_(values(name, 2, self.ranks[0]))
        self.mesh.share_parameters()

    def held(self, name: str, whole: Tensor) -> Tensor:
        return local(of_rows(whole, self.device_mesh)) if self.shard else whole


@contextmanager
def counted():
    """Calls of collectives, and the most bytes of one."""
    calls, before = Counter(), {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name):
        def call(*arguments, **options):
            calls[name] += 1
            for one in arguments[:2] if name == SENDS else ():
                calls["bytes"] = max(calls["bytes"], one.nbytes)
            return before[name](*arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, before[name])


def said(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def reduced(shard: bool) -> dict:
    case = Case(shard)
    case.bring_gradients()
    strides = {name: p.grad.stride() for name, p in case.layers.items()}
    case.mesh.reduce_gradients()
    grads = {name: one.grad for name, one in case.own.items()}
    return {
        "own": list(case.own),
        "exact": [n for n, grad in grads.items() if torch.equal(grad, case.mean(n))],
        "types": [n for n, grad in grads.items() if grad.dtype == case.own[n].dtype],
        "strides": [n for n, grad in grads.items() if shard or grad.stride() == strides[n]],
        "left": [n for n, p in case.layers.items() if p.grad is not None],
    }


def near_torch() -> float:
    """How far sums in the order of ranks are from torch's, relative to the gradient."""
    case, errors = Case(False), []
    case.bring_gradients()
    sums = {name: p.grad.float().clone() for name, p in case.layers.items()}
    for one in sums.values():
        dist.all_reduce(one, group=case.mesh.worker)
    case.mesh.reduce_gradients()
    for name, one in case.own.items():
        expected = sums[name] / len(case.ranks)
        if one.dtype == torch.float32:
            errors.append(float((one.grad - expected).norm() / expected.norm()))
    return max(errors, default=0.0)


def other_types(shard: bool) -> list[str]:
    """Of bfloat16 layers with float32 gradients the types that those have then."""
    case = Case(shard)
    case.bring_gradients()
    half = case.layers["half"]
    if not OTHER_TYPES:
        return []
    half.grad, half.grad_dtype = None, None
    half.grad = case.mean("half").float() / 3
    if shard:
        half.grad = of_rows(half.grad, case.device_mesh)
    case.mesh.reduce_gradients()
    expected = (case.mean("half").float() / 3).to(torch.bfloat16 if shard else torch.float32)
    found = [one.grad for name, one in case.own.items() if name == "half"]
    return [str(one.dtype) for one in found if torch.allclose(one, expected, rtol=1e-6)]


def shared(shard: bool) -> dict:
    case = Case(shard)
    for one in case.own.values():
        one.grad = torch.zeros_like(one)
    with torch.no_grad():
        for name, one in case.own.items():
            one.copy_(values(name, 2, case.ranks[0]))
    versions = [one._version for one in case.own.values()]
    case.mesh.share_parameters()
    return {
        "exact": [
            name
            for name, p in case.layers.items()
            if torch.equal(local(p.detach()), case.held(name, values(name, 2, case.ranks[0])))
        ],
        "untouched": versions == [one._version for one in case.own.values()],
        "gradients": sum(one.grad is not None for one in case.own.values()),
        "own": len(case.own),
        "rows": [len(local(p)) for p in case.layers.values()],
    }


def steps(shard: bool) -> dict:
    """Collectives when it is built, and of steps: of one before which a rank writes, and others."""
    with counted() as built:
        case = Case(shard)
    found = {"built": dict(built)}
    for when in ("first", "written", "then"):
        if when == "written" and dist.get_rank() == case.ranks[-1]:
            with torch.no_grad():
                case.layers["query"].mul_(2)
        versions = [one._version for one in case.own.values()]
        with counted() as calls:
            case.step()
        found[when] = dict(calls)
        found[f"{when} seen"] = [
            one._version - before for one, before in zip(case.own.values(), versions, strict=True)
        ]
    found["model bytes"] = sum(p.numel() * p.element_size() for p in case.layers.values())
    case.step()
    with torch.no_grad():
        for p in case.layers.values():
            p.mul_(2)
    case.mesh.gather_parameters()
    found["gathered"] = [
        name
        for name, one in case.own.items()
        if torch.equal(one, 2 * values(name, 2, case.ranks[0]))
    ]
    return found


def by_fully_shard() -> list[float]:
    """How far a model that torch shards is from the same one whole, and how often it has sent."""
    size = int(sys.argv[2])
    results = []
    for shard in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
        if shard:
            device_mesh = new_mesh(size, "cpu")
            fully_shard(model, mesh=device_mesh["rank"], reshard_after_forward=True)
            mesh = WorkerMesh(model.parameters(), mesh=device_mesh)
        else:
            mesh = WorkerMesh(model.parameters(), size)
        mesh.max_norm = 0.5
        inner = torch.optim.AdamW(mesh.share(model.named_parameters()), lr=0.1)
        for step in range(STEPS):
            data = torch.Generator().manual_seed(10 * step + dist.get_rank())
            model(torch.randn(4, 8, generator=data)).square().mean().backward()
            with counted() as calls:
                mesh.reduce_gradients()
                inner.step()
                model.zero_grad()
                mesh.share_parameters()
        weights = [p.full_tensor() if shard else p for p in model.parameters()]
        results.append(torch.cat([one.detach().flatten() for one in weights]))
    return [float((results[0] - results[1]).norm() / results[0].norm()), calls[SENDS]]


def places() -> dict:
    case = Case(False)
    mesh = case.mesh
    groups = [
        {"name": "all", "params": list(case.layers.items()), "lr": 1},
        {"name": "none", "params": []},
    ]
    return {
        "worker": dist.get_process_group_ranks(mesh.worker),
        "peers": dist.get_process_group_ranks(mesh.peers),
        "names": mesh.device_mesh.mesh_dim_names,
        "mesh": mesh.device_mesh.mesh.tolist(),
        "of rank": mesh.device_mesh["rank"].mesh.tolist(),
        "stream": mesh.stream,
        "size": mesh.ranks_per_worker,
        "backends": [
            dist.get_backend(WorkerMesh(case.layers.values(), len(case.ranks), backend=one).peers)
            for one in (None, "gloo")
        ],
        "own": list(case.own),
        "groups": [
            {**group, "params": [name for name, _ in group["params"]]}
            for group in mesh.share(groups)
        ],
        "bare": [len(group["params"]) for group in mesh.share(case.layers.values())],
        "total": mesh.total(dist.get_rank(), 2**40),
    }


def errors() -> dict:
    case, size, world = Case(False), int(sys.argv[2]), dist.get_world_size()
    layers = list(case.layers.values())

    def of_one_rank():
        with case.mesh.together():
            if dist.get_rank() == case.ranks[-1]:
                raise KeyError("of the last rank")

    in_columns = new_mesh(size, "cpu")
    mixed = [Case(True).layers["query"], *layers]
    some_sharded = mixed if dist.get_rank() % size == 0 else layers[:1] + layers
    flat = init_device_mesh("cpu", (world,), mesh_dim_names=("rank",))
    return {
        "of one rank": said(of_one_rank),
        "no divisor": said(lambda: WorkerMesh(layers, world + 1)),
        "no number": said(lambda: WorkerMesh(layers)),
        "none": said(lambda: WorkerMesh(layers, 0)),
        "few layers": said(lambda: WorkerMesh(layers[:1], size)),
        "mixed": said(lambda: WorkerMesh(some_sharded, mesh=in_columns)),
        "flat": said(lambda: WorkerMesh(layers, mesh=flat)),
        "both": said(lambda: WorkerMesh(layers, size, mesh=in_columns)),
    }


def left_groups() -> list[int]:
    """Process groups before, with a mesh, after its end, after a refusal, and with a given mesh."""
    layers, size = [Parameter(values(name)) for name in SHAPES], int(sys.argv[2])
    groups = dist.distributed_c10d._world.pg_map
    counts = [len(groups)]
    mesh = WorkerMesh(layers, size)
    counts.append(len(groups))
    mesh.close()
    mesh.close()
    counts.append(len(groups))
    said(lambda: WorkerMesh(layers[:1], size))
    counts.append(len(groups))
    given = new_mesh(size, "cpu")
    WorkerMesh(layers, mesh=given).close()
    counts.append(len(groups))
    return counts


def named() -> dict:
    """Layers that their owners have named, and what is said of a gradient that is missing."""
    case = Case(False)
    case.bring_gradients()
    case.layers["query"].grad = None
    before = said(lambda: bring_gradients(case.mesh.layers, "it"))
    with case.mesh.together():
        case.mesh.name([Layer(f"its {n}", p, p.numel(), "error") for n, p in case.own.items()])
    then = said(lambda: bring_gradients(case.mesh.layers, "it"))
    zero = [one for one in case.mesh.layers if one.parameter in case.mesh.own]
    with case.mesh.together():
        case.mesh.name([one._replace(missing_grad="zero") for one in zero])
    return {
        "names": [one.name for one in case.mesh.layers],
        "before": before,
        "then": then,
        "zero": said(lambda: bring_gradients(case.mesh.layers, "it")),
    }


def copied() -> dict:
    """A copy of layers and mesh, after a change of the owners' layers in it."""
    case = Case(False)
    layers, mesh = deepcopy((case.layers, case.mesh))
    with torch.no_grad():
        for one in mesh.own.values():
            one.zero_()
    mesh.share_parameters()
    return {
        "own": [name for name, p in layers.items() if mesh.own.get(p) is p],
        "changed": [name for name, p in layers.items() if not p.any()],
        "as before": [n for n, p in case.layers.items() if torch.equal(p, values(n))],
        "groups": mesh.worker is case.mesh.worker and mesh.peers is case.mesh.peers,
    }


def main() -> None:
    dist.init_process_group("gloo")
    results = {
        "places": places(),
        "errors": errors(),
        "groups": left_groups(),
        "named": named(),
        "copied": copied(),
        "by fully_shard": by_fully_shard(),
        "near torch": near_torch(),
    }
    results["at once"] = steps(False)
    meshes.PARTS, meshes.LEAST = PARTS, 1
    for shard in (False, True):
        results[f"reduced {shard}"] = reduced(shard)
        results[f"shared {shard}"] = shared(shard)
        results[f"steps {shard}"] = steps(shard)
        results[f"other types {shard}"] = other_types(shard)
    torch.save(results, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
