"""Whether ranks hold the same: parameters, settings, numbers, and the mean of G_j."""

from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

from ef21_muon.settings import plain
from ef21_muon.transport.fingerprint import fingerprint, projection
from ef21_muon.transport.fixed import place_in

# Why parameters differ between ranks, at first and later, and what to do.
UNEQUAL = (
    "build the model from one seed, or broadcast rank 0's first, since another kind of processor "
    "may draw other numbers from one seed"
)
PARTED = (
    "they were the same at first; if the ranks' processors, BLAS libraries or numbers of threads "
    "differ, they compute other bits: {}start all ranks on one kind of processor; else one was "
    "changed or damaged: go on from a checkpoint"
)


def require_equal_parameters(
    named: list[tuple[str, Tensor]], group: dist.ProcessGroup | None, why: str
) -> None:
    """Raise ValueError, on all ranks, for the first parameter that differs between them.

    why: the causes that there may be, and what to do.
    """
    _, ranks = place_in(group)
    if ranks == 1:
        return
    mine = torch.stack([fingerprint(parameter) for _, parameter in named])
    every = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(every, mine, group=group)
    differs = (torch.stack(every) != every[0]).nonzero().tolist()
    if differs:
        rank, layer = differs[0]
        raise ValueError(
            f"{named[layer][0]} differs between rank 0 and rank {rank}: all workers hold the same "
            f"parameters; {why}"
        )


def first_difference(
    mine: dict, device: torch.device, group: dist.ProcessGroup | None, only_common: bool = False
) -> tuple[int, str, str, str] | None:
    """The first rank that has another value than rank 0, its name, and both values; or None.

    The same on all ranks. only_common: of names that both have.
    """
    _, ranks = place_in(group)
    if ranks == 1:
        return None
    digest = torch.tensor([*sha256(str(mine).encode()).digest()], device=device)
    digests = [torch.empty_like(digest) for _ in range(ranks)]
    dist.all_gather(digests, digest, group=group)
    if all(torch.equal(one, digests[0]) for one in digests):
        return None
    every = [None] * ranks
    dist.all_gather_object(every, mine, group=group)
    for rank, its in enumerate(every):
        for name in [*every[0], *its]:
            if only_common and not (name in every[0] and name in its):
                continue
            first, other = (str(one.get(name, "not there")) for one in (every[0], its))
            if first != other:
                return rank, name, first, other
    return None


def require_equal_settings(
    mine: dict, device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """Raise ValueError, on all ranks, for a setting that differs between them."""
    if found := first_difference(mine, device, group):
        rank, name, first, other = found
        raise ValueError(
            f"{name} is {first} on rank 0 and {other} on rank {rank}: give all workers the same "
            "optimizer"
        )


def require_equal_groups(groups: list[dict], group: dist.ProcessGroup | None) -> None:
    """Raise ValueError, on all ranks, for a number of a parameter group that differs between them.

    groups: parameter groups, with the same entries on all ranks.
    """
    _, ranks = place_in(group)
    if ranks == 1:
        return
    numbers = [
        (index, name, float(value))
        for index, of_group in enumerate(groups)
        for name, value in sorted((name, plain(value)) for name, value in of_group.items())
        if isinstance(value, int | float)
    ]
    device = next(p.device for of_group in groups for p in of_group["params"])
    mine = torch.tensor([number for *_, number in numbers], dtype=torch.float64, device=device)
    every = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(every, mine, group=group)
    differs = (torch.stack(every) != every[0]).nonzero().tolist()
    if differs:
        rank, place = differs[0]
        index, name, _ = numbers[place]
        raise ValueError(
            f"{name} of group {index} is {every[0][place]:g} on rank 0 and {every[rank][place]:g} "
            f"on rank {rank}: give all workers the same groups, and schedules"
        )


def require_mean_estimate(batches, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError for a layer served here whose G is not the mean of all workers' G_j.

    Compares a random projection of either, to a thousandth of the norms: rounding is far below,
    a lost or a foreign G_j far above.
    """
    _, ranks = place_in(group)
    mine = torch.cat([projection(batch.up.memory) for batch in batches])
    every = [torch.empty_like(mine) for _ in range(ranks)]
    if ranks > 1:
        dist.all_gather(every, mine, group=group)
    else:
        every = [mine]
    means = torch.stack(every).mean(0).split([len(batch.names) for batch in batches])
    for batch, mean in zip(batches, means, strict=True):
        served = batch.owned
        error = (projection(batch.state["server_gradient"]) - mean[served]).abs()
        norms = torch.linalg.matrix_norm(batch.state["server_gradient"])
        norms += torch.linalg.matrix_norm(batch.up.memory[served])
        for name, wrong in zip(batch.names[served], (error > 1e-3 * norms).tolist(), strict=True):
            if wrong:
                raise ValueError(
                    f"the servers' gradient estimate of {name} is not the mean of the workers': "
                    "a worker's state was lost or damaged; go on from a checkpoint"
                )


def require_finite(problem: str | None, device: torch.device, group: dist.ProcessGroup | None):
    """Raise FloatingPointError, on all ranks, for a problem of any, which it names."""
    _, ranks = place_in(group)
    failed = torch.tensor(int(problem is not None), device=device)
    if ranks > 1:
        dist.all_reduce(failed, group=group)
    if not failed:
        return
    problems = [problem] * ranks
    if ranks > 1:
        dist.all_gather_object(problems, problem, group=group)
    rank = next(rank for rank, its in enumerate(problems) if its is not None)
    raise FloatingPointError(f"rank {rank}: {problems[rank]}" if ranks > 1 else problem)
