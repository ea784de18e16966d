"""Trainings through folders of torch.distributed.checkpoint; see test_distributed_checkpoint.py.

    checkpoint_folders.py DIRECTORY RANKS_PER_WORKER [sharded]

Every case takes steps, saves on all ranks into one folder, reads the folder into a new model and
optimizer, and lets both go on. Writes DIRECTORY/rank{r}.pt: what of them differs by case, and what
was said of wrong calls.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from newer_torch import flattens_tables
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps, WorkerMesh
from ef21_muon.compressors import RandK, TopK
from ef21_muon.norms import Sign, Spectral

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
BEFORE, AFTER = 7, 4  # steps, of which the first end while a message travels


def adamw(groups):
    return torch.optim.AdamW(plain(groups, "name", "params", "betas"), lr=0.01)


def muon(groups):
    return EF21Muon(plain(groups, "name", "params", "norm"), process_group=ALONE, seed=3)


def plain(groups, *entries):
    return [{key: one for key, one in group.items() if key in entries} for group in groups]


def whole(groups, mesh):
    return plain(groups, "name", "params", "norm", "lr")


def shared(groups, mesh):
    return mesh.share(groups) if mesh else groups


CASES = {
    "sharded": lambda g, mesh: EF21Muon(
        whole(g, mesh), mesh=mesh, w2s=RandK(0.3), s2w=RandK(0.5), server="sharded"
    ),
    "rank0": lambda g, mesh: EF21Muon(whole(g, mesh), mesh=mesh, w2s=TopK(0.3), server="rank0"),
    "replicated": lambda g, mesh: EF21Muon(
        whole(g, mesh), mesh=mesh, w2s=RandK(0.3), server="replicated"
    ),
    "local": lambda g, mesh: LocalSteps(
        muon(shared(g, mesh)), 4, w2s=RandK(0.3), outer_momentum=0.5, mesh=mesh, server="sharded"
    ),
    "local, under way": lambda g, mesh: LocalSteps(
        adamw(shared(g, mesh)), 6, w2s=RandK(0.3), s2w=RandK(0.5), sync_delay=2, mesh=mesh
    ),
    "averaged": lambda g, mesh: AveragedGradients(
        adamw(shared(g, mesh)), w2s=RandK(0.3), mesh=mesh, server="sharded"
    ),
    "averaged, lossless": lambda g, mesh: AveragedGradients(
        adamw(shared(g, mesh)), mesh=mesh, server="rank0"
    ),
}
FLAT_CASES = ("sharded", "local, under way")
# Cases with how a state goes from one training to the other.
WAYS = [
    *((case, "folder") for case in CASES if not (flattens_tables() and case in FLAT_CASES)),
    *((case, "flat folder") for case in FLAT_CASES if flattens_tables()),
    *(("rank0", "full state"), ("local", "full state")),
]
NO_TABLE = "averaged, lossless"  # on ranks that serve nothing


# Of workers of several ranks: whole layers, and shards.
OF_SEVERAL = {
    "": [("rank0", "folder"), ("local, under way", "folder"), WAYS[-3]],
    "sharded": [("sharded", "folder"), ("averaged", "folder"), ("local", "full state")],
}


def ways(ranks_per_worker: int, kind: str = "") -> list[tuple[str, str]]:
    """All where every rank is a worker; of workers of several ranks some."""
    return WAYS if ranks_per_worker == 1 else OF_SEVERAL[kind]


def new_model() -> nn.Module:
    """Its large layer is all that the first rank of a worker steps."""
    return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 60), nn.Linear(60, 5))


def groups_of(model: nn.Module) -> list[dict]:
    named = [*model.named_parameters()]
    bias = {"params": named[1::2], "norm": Sign(), "lr": 0.003, "betas": (0.8, 0.9)}
    return [{"name": "bias", **bias}, {"name": "weight", "params": named[::2], "norm": Spectral()}]


class Training:
    def __init__(self, case: str):
        size = int(sys.argv[2])
        torch.manual_seed(0)
        self.model, device_mesh = new_model(), None
        if "sharded" in sys.argv[3:]:
            shape = dist.get_world_size() // size, size
            device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=("worker", "rank"))
            fully_shard(self.model, mesh=device_mesh["rank"], reshard_after_forward=True)
        groups = groups_of(self.model)
        self.worker, self.mesh = dist.get_rank() // size, None
        parameters = self.model.parameters()
        if device_mesh:
            self.mesh = WorkerMesh(parameters, mesh=device_mesh)
        elif size > 1:
            self.mesh = WorkerMesh(parameters, size)
        self.optimizer = CASES[case](groups, self.mesh)

    def take(self, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            self.model.zero_grad()
            self.model(torch.randn(16, 6, generator=generator)).square().mean().backward()
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9
            self.optimizer.step()

    def state(self, options: StateDictOptions | None = None) -> dict:
        """With a model for each worker, since between rounds of local steps they differ."""
        return {
            f"model of worker {self.worker}": get_model_state_dict(self.model),
            "optim": get_optimizer_state_dict(self.model, self.optimizer, options=options),
        }

    def set(self, state: dict, options: StateDictOptions | None = None) -> None:
        set_model_state_dict(self.model, state[f"model of worker {self.worker}"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optim"], options=options)

    def flat(self) -> dict[str, Tensor | str]:
        """All that makes the next step, by name."""
        found = {name: held(one) for name, one in self.model.state_dict().items()}
        state = self.optimizer.state_dict()
        return found | leaves("state", state["state"]) | {"groups": str(state["param_groups"])}


def held(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def leaves(name: str, value) -> dict[str, Tensor]:
    if isinstance(value, dict):
        return {
            key: one
            for part, its in value.items()
            for key, one in leaves(f"{name}.{part}", its).items()
        }
    return {name: value}


def differing(one: Training, other: Training) -> list[str]:
    mine, its = one.flat(), other.flat()
    return [n for n in mine.keys() | its.keys() if not same(mine.get(n), its.get(n))]


def same(one, other) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def resumed(case: str, load: Callable[[Training, Training], None]) -> dict:
    """How a training, and another one that loads its state, differ before and after, and later."""
    one, other = Training(case), Training(case)
    one.take(0, BEFORE)
    before = differing(one, other)
    load(one, other)
    loaded = differing(one, other)
    one.take(BEFORE, AFTER)
    other.take(BEFORE, AFTER)
    return {
        "before": len(before),
        "loaded": loaded,
        "end": differing(one, other),
        "steps": other.optimizer.steps,
        "groups": [group["name"] for group in other.optimizer.param_groups],
        "is the model's": is_of_the_model(other),
    }


def is_of_the_model(training: Training) -> bool:
    own = set(training.model.parameters())
    shown = [p for group in training.optimizer.param_groups for p in group["params"]]
    return own.issuperset(shown) and own.issuperset(training.optimizer.state)


def through_folder(folder: Path, options: StateDictOptions | None = None):
    def load(one: Training, other: Training) -> None:
        dcp.save(one.state(options), checkpoint_id=folder)
        read = other.state(options)
        dcp.load(read, checkpoint_id=folder)
        other.set(read, options)

    return load


def through_full(one: Training, other: Training) -> None:
    box = [one.optimizer.full_state_dict()]
    dist.broadcast_object_list(box)
    set_model_state_dict(other.model, get_model_state_dict(one.model))
    other.optimizer.load_state_dict(box[0])


def said(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals() -> dict[str, str]:
    """What is said of calls that would lose what other ranks remember, and of others' states."""
    one = Training("sharded")
    one.take(0, 1)
    full = StateDictOptions(full_state_dict=True)
    offloaded = StateDictOptions(full_state_dict=True, cpu_offload=True)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = one.state()
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, one.optimizer.state_dict())
    before = copy.deepcopy(one.flat())
    result = {
        "full": said(lambda: one.state(full)),
        "full, offloaded": said(lambda: one.state(offloaded)),
        "set full": said(lambda: one.set(state, full)),
        "broadcast": said(lambda: one.set(state, broadcast)),
        "of the next rank": said(
            lambda: one.optimizer.load_state_dict(of_ranks[dist.get_rank() - 1])
        ),
        "flat without tables": said(lambda: Training(NO_TABLE).state(FLAT)),
    }
    after = one.flat()
    assert all(same(value, after[name]) for name, value in before.items()), "nothing has changed"
    return result


def main():
    dist.init_process_group("gloo")
    directory, found = Path(sys.argv[1]), {}
    for case, way in ways(int(sys.argv[2]), *sys.argv[3:]):
        load = {
            "folder": through_folder(directory / case),
            "flat folder": through_folder(directory / f"{case}, flat", FLAT),
            "full state": through_full,
        }[way]
        found[case, way] = resumed(case, load)
    result = {"ways": found, "refusals": refusals()}
    torch.save(result, directory / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
