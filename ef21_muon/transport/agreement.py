"""Checks that ranks hold the same parameters, settings and numbers, and the mean of all G_j."""

from collections.abc import Sequence
from functools import cache
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

from ef21_muon.checks.settings import plain
from ef21_muon.layers import Batch
from ef21_muon.transport.fixed import ALONE, Group, gathered, place_in

# Why parameters differ between ranks, at the start and later, and what to do.
UNEQUAL = (
    "build the model from one seed, or broadcast rank 0's first, since another kind of processor "
    "may draw other numbers from one seed"
)
DIVERGED = (
    "they were the same at first; if the ranks' processors, BLAS libraries or numbers of threads "
    "differ, they compute other bits: {}start all ranks on one kind of processor; else one was "
    "changed or damaged: resume from a checkpoint"
)
CHUNK = 1 << 20  # entries
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_equal_parameters(named: Sequence[tuple[str, Tensor]], group: Group, why: str) -> None:
    """Check that all ranks hold the same parameters; to be called on all of them.

    Args:
        named: pairs of a name and a parameter, in the same order on all ranks.
        group: the ranks.
        why: the possible causes and what to do, for the error.

    Raises:
        ValueError: on all ranks, for the first parameter that differs from rank 0's.
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
    """Find the first value that differs between rank 0 and another rank; the same on all ranks.

    Args:
        mine: values by name, whose text is compared.
        device: where the group's collectives take tensors.
        group: the ranks.
        only_common: whether to compare the names alone that both ranks have.

    Returns:
        The other rank, the name, rank 0's value and the other one's; None if nothing differs.
    """
    if group == ALONE or place_in(group)[1] == 1:
        return None
    digest = torch.tensor([*sha256(str(mine).encode()).digest()], device=device)
    digests = gathered(digest, group)
    if torch.equal(digests, digests[:1].expand_as(digests)):
        return None
    every: list[dict] = [{} for _ in digests]
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
    """Check that all ranks have the same settings; to be called on all of them.

    Args:
        mine: settings by name.
        device: where the group's collectives take tensors.
        group: the ranks.
        what: what has these settings, for the error.

    Raises:
        ValueError: on all ranks, for the first setting that differs.
    """
    if found := first_difference(mine, device, group):
        rank, name, first, other = found
        raise ValueError(
            f"{name} is {first} on rank 0 and {other} on rank {rank}: give all workers the same "
            f"{what}"
        )


def require_equal_groups(groups: list[dict], group: Group) -> None:
    """Check that all ranks have the same numbers, such as lr, in their parameter groups.

    Raises:
        ValueError: on all ranks, for the first number that differs.
    """
    numbers = {
        f"{name} of group {index}": float(value)
        for index, of_group in enumerate(groups)
        for name, value in sorted((name, plain(value)) for name, value in of_group.items())
        if isinstance(value, int | float)
    }
    device = next(p.device for of_group in groups for p in of_group["params"])
    require_equal_settings(numbers, device, group, "groups, and schedules")


def require_mean_estimate(batches: Sequence[Batch], group: Group) -> None:
    """Check that the servers' gradient estimate G is the mean of all workers' G_j.

    Compares random projections of both, with a tolerance of a thousandth of the norms: rounding
    errors are far smaller, and the error of a lost or a foreign G_j is far larger.

    Raises:
        ValueError: on the owner rank of a layer for which it is not.
    """
    of_worker = [batch.up.buffer for batch in batches if batch.up.buffer is not None]
    mine = torch.cat([*map(projection, of_worker)])
    means = gathered(mine, group).mean(0).split([len(batch.names) for batch in batches])
    for batch, buffer, mean in zip(batches, of_worker, means, strict=True):
        estimate, owned = batch.state["server_gradient"], batch.owned
        error = (projection(estimate) - mean[owned]).abs()
        norms = torch.linalg.matrix_norm(estimate)
        norms += torch.linalg.matrix_norm(buffer[owned])
        for name, wrong in zip(batch.names[owned], (error > 1e-3 * norms).tolist(), strict=True):
            if wrong:
                raise ValueError(
                    f"the servers' gradient estimate of {name} is not the mean of the workers': "
                    "a worker's state was lost or damaged; resume from a checkpoint"
                )


def require_finite(problem: str | None, group: Group) -> None:
    """Raise FloatingPointError, on all ranks, if one of them has a problem.

    Args:
        problem: this rank's, in words; None if all is finite.
        group: the ranks.
    """
    _, ranks = place_in(group)
    problems = [problem] * ranks
    if group != ALONE and ranks > 1:
        dist.all_gather_object(problems, problem, group=group)
    for rank, its in enumerate(problems):
        if its is not None:
            raise FloatingPointError(f"rank {rank}: {its}" if ranks > 1 else its)


def fingerprint(tensor: Tensor) -> Tensor:
    """A checksum of a tensor: a scalar int64 that depends on every bit and its place.

    Entries are taken as integers and weighted by fixed odd numbers, so that a single changed entry
    changes the sum modulo 2^64; the sums of chunks are combined as a polynomial. Does not wait for
    the device.
    """
    bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
    weights = _weights(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(CHUNK):
        total = total * 6364136223846793005 + (chunk * weights[: len(chunk)]).sum()
    return total


def projection(matrices: Tensor) -> Tensor:
    """The inner product of every matrix of a batch (L, m, n) with a matrix of random signs.

    For a matrix of independent errors it is about as large as their Frobenius norm.

    Returns:
        float64 (L,).
    """
    rows = matrices.flatten(1)
    signs = _weights(matrices.device)[: rows.shape[1]].sign().double()
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for chunk in rows.split(CHUNK, 1):
        total += chunk.double() @ signs[: chunk.shape[1]]
    return total


@cache
def _weights(device: torch.device) -> Tensor:
    """CHUNK odd int64 numbers, the same in every process: drawn on the CPU, as a GPU differs."""
    generator = torch.Generator("cpu").manual_seed(0)
    limits = torch.iinfo(torch.int64)
    weights = torch.randint(limits.min, limits.max, (CHUNK,), generator=generator, device="cpu")
    return weights.bitwise_or_(1).to(device)
