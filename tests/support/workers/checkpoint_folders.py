"""Trainings through folders of torch.distributed.checkpoint; see test_distributed_checkpoint.py.

    checkpoint_folders.py DIRECTORY RANKS_PER_WORKER [sharded]

Every case takes steps, saves on all ranks into one folder, reads the folder into a new model and
optimizer, and lets both go on. Writes DIRECTORY/rank{r}.pt: what of them differs by case, and what
was said of wrong calls.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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

WIDTHS = (6, 9, 8, 8, 5)
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
# torch finds again what is under the name of a table, and a rank has none here.
NOT_FLAT = ("averaged, lossless",)


class Training:
    def __init__(self, case: str):
        size = int(sys.argv[2])
        torch.manual_seed(0)
        layers = [nn.Linear(m, n) for m, n in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)]
        self.model, device_mesh = nn.Sequential(*layers), None
        if "sharded" in sys.argv[3:]:
            shape = dist.get_world_size() // size, size
            device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=("worker", "rank"))
            fully_shard(self.model, mesh=device_mesh["rank"], reshard_after_forward=True)
        named = [*self.model.named_parameters()]
        groups = [
            {
                "name": "odd",
                "params": named[1::2],
                "norm": Sign(),
                "lr": 0.003,
                "betas": (0.8, 0.9),
            },
            {"name": "even", "params": named[::2], "norm": Spectral()},
        ]
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
            self.model(torch.randn(16, WIDTHS[0], generator=generator)).square().mean().backward()
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
    return [
        name
        for name in mine.keys() | its.keys()
        if not (str(mine.get(name)) == str(its.get(name)) and same(mine[name], its[name]))
    ]


def same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def through_folder(case: str, folder: Path, options: StateDictOptions | None) -> dict:
    one, other = Training(case), Training(case)
    one.take(0, BEFORE)
    dcp.save(one.state(options), checkpoint_id=folder)
    read = other.state(options)
    dcp.load(read, checkpoint_id=folder)
    other.set(read, options)
    loaded = differing(one, other)
    one.take(BEFORE, AFTER)
    other.take(BEFORE, AFTER)
    return {"loaded": loaded, "end": differing(one, other), "steps": other.optimizer.steps}


def through_full(case: str) -> dict:
    one, other = Training(case), Training(case)
    one.take(0, BEFORE)
    box = [one.optimizer.full_state_dict()]
    dist.broadcast_object_list(box)
    set_model_state_dict(other.model, get_model_state_dict(one.model))
    other.optimizer.load_state_dict(box[0])
    loaded = differing(one, other)
    one.take(BEFORE, AFTER)
    other.take(BEFORE, AFTER)
    return {"loaded": loaded, "end": differing(one, other), "steps": other.optimizer.steps}


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
    before = str(one.flat())
    result = {
        "full": said(lambda: one.state(full)),
        "full, offloaded": said(lambda: one.state(offloaded)),
        "set full": said(lambda: one.set(state, full)),
        "broadcast": said(lambda: one.set(state, broadcast)),
        "of the next rank": said(
            lambda: one.optimizer.load_state_dict(of_ranks[dist.get_rank() - 1])
        ),
        "flat without tables": said(lambda: Training(NOT_FLAT[0]).state(FLAT)),
    }
    assert str(one.flat()) == before, "nothing has changed"
    return result


def main():
    dist.init_process_group("gloo")
    directory, result = Path(sys.argv[1]), {}
    for case in CASES:
        for way, options in (("", None), (", flat", FLAT)):
            if not (options and case in NOT_FLAT):
                folder = directory / f"{case}{way}"
                result[f"{case}{way}"] = through_folder(case, folder, options)
        result[f"{case}, full"] = through_full(case)
    result["refusals"] = refusals()
    torch.save(result, directory / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
