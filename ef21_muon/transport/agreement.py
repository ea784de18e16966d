"""Whether ranks hold the same: parameters, settings, numbers, and the mean of G_j."""

from functools import cache
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

from ef21_muon.settings import plain
from ef21_muon.transport.fixed import Group, gathered, place_in

# Why parameters differ between ranks, at first and later, and what to do.
UNEQUAL = (
    "build the model from one seed, or broadcast rank 0's first, since another kind of processor "
    "may draw other numbers from one seed"
)
DIVERGED = (
    "they were the same at first; if the ranks' processors, BLAS libraries or numbers of threads "
    "differ, they compute other bits: {}start all ranks on one kind of processor; else one was "
    "changed or damaged: go on from a checkpoint"
)
CHUNK = 1 << 20
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_equal_parameters(named: list[tuple[str, Tensor]], group: Group, why: str) -> None:
    """Raise ValueError, on all ranks, for the first parameter that differs between them.

    why: the causes that there may be, and what to do.
    """
    if place_in(group)[1] == 1:
        return
    every = gathered(torch.stack([fingerprint(parameter) for _, parameter in named]), group)
    if differs := (every != every[0]).nonzero().tolist():
        rank, layer = differs[0]
        raise ValueError(
            f"{named[layer][0]} differs between rank 0 and rank {rank}: all workers hold the same "
            f"parameters; {why}"
        )


def first_difference(
    mine: dict, device: torch.device, group: Group, only_common: bool = False
) -> tuple[int, str, str, str] | None:
    """The first rank that has another value than rank 0, its name, and both values; or None.

    The same on all ranks. only_common: of names that both have.
    """
    if place_in(group)[1] == 1:
        return None
    digest = torch.tensor([*sha256(str(mine).encode()).digest()], device=device)
    digests = gathered(digest, group)
    if torch.equal(digests, digests[:1].expand_as(digests)):
        return None
    every = [None] * len(digests)
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
    mine: dict, device: torch.device, group: Group, what: str = "optimizer"
) -> None:
    """Raise ValueError, on all ranks, for a setting of `what` that differs between them."""
    if found := first_difference(mine, device, group):
        rank, name, first, other = found
        raise ValueError(
            f"{name} is {first} on rank 0 and {other} on rank {rank}: give all workers the same "
            f"{what}"
        )


def require_equal_groups(groups: list[dict], group: Group) -> None:
    """Raise ValueError, on all ranks, for a number of a group that differs between them."""
    numbers = {
        f"{name} of group {index}": float(value)
        for index, of_group in enumerate(groups)
        for name, value in sorted((name, plain(value)) for name, value in of_group.items())
        if isinstance(value, int | float)
    }
    device = next(p.device for of_group in groups for p in of_group["params"])
    require_equal_settings(numbers, device, group, "groups, and schedules")


def require_mean_estimate(batches, group: Group) -> None:
    """Raise ValueError for a layer served here whose G is not the mean of all workers' G_j.

    Compares a random projection of either, to a thousandth of the norms: rounding is far below,
    a lost or a foreign G_j far above.
    """
    mine = torch.cat([projection(batch.up.buffer) for batch in batches])
    means = gathered(mine, group).mean(0).split([len(batch.names) for batch in batches])
    for batch, mean in zip(batches, means, strict=True):
        estimate, served = batch.state["server_gradient"], batch.owned
        error = (projection(estimate) - mean[served]).abs()
        norms = torch.linalg.matrix_norm(estimate)
        norms += torch.linalg.matrix_norm(batch.up.buffer[served])
        for name, wrong in zip(batch.names[served], (error > 1e-3 * norms).tolist(), strict=True):
            if wrong:
                raise ValueError(
                    f"the servers' gradient estimate of {name} is not the mean of the workers': "
                    "a worker's state was lost or damaged; go on from a checkpoint"
                )


def require_finite(problem: str | None, group: Group) -> None:
    """Raise FloatingPointError, on all ranks, for a problem of any, which it names."""
    _, ranks = place_in(group)
    problems = [problem] * ranks
    if ranks > 1:
        dist.all_gather_object(problems, problem, group=group)
    for rank, its in enumerate(problems):
        if its is not None:
            raise FloatingPointError(f"rank {rank}: {its}" if ranks > 1 else its)


def fingerprint(tensor: Tensor) -> Tensor:
    """A scalar int64 that depends on every bit of `tensor` and on its place, modulo 2^64.

    Entries as integers are weighted by fixed odd numbers, so one that changes changes the sum; the
    sums of chunks are combined as a polynomial. Does not wait for the device.
    """
    bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
    weights = _weights(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(CHUNK):
        total = total * 6364136223846793005 + (chunk * weights[: len(chunk)]).sum()
    return total


def projection(matrices: Tensor) -> Tensor:
    """The inner product of every matrix of a batch (L, m, n) with one of random signs, (L,).

    In float64. Of a matrix of independent errors it has about the size of their Frobenius norm.
    """
    rows = matrices.flatten(1)
    signs = _weights(matrices.device)[: rows.shape[1]].sign().double()
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for chunk in rows.split(CHUNK, 1):
        total += chunk.double() @ signs[: chunk.shape[1]]
    return total


@cache
def _weights(device: torch.device) -> Tensor:
    """CHUNK odd int64 numbers, the same in every process: a GPU would draw others than a CPU."""
    generator = torch.Generator("cpu").manual_seed(0)
    limits = torch.iinfo(torch.int64)
    weights = torch.randint(limits.min, limits.max, (CHUNK,), generator=generator, device="cpu")
    return weights.bitwise_or_(1).to(device)
