"""What the optimizer refuses, before it changes anything."""

from contextlib import suppress
from hashlib import sha256
from math import isfinite
from operator import is_

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ef21_muon.exchange.collectives import place_in
from ef21_muon.exchange.instances import instances
from ef21_muon.fingerprint import fingerprint, projection
from ef21_muon.lmo.norms import AdaptiveRadius, Norm
from ef21_muon.messages.compressors import Compressor
from ef21_muon.messages.switch import Switch

NUMBERS = {
    "lr": ("of at least 0", lambda lr: lr >= 0),
    "radius": ("above 0, or an AdaptiveRadius", lambda radius: radius > 0),
    "beta": ("above 0, at most 1", lambda beta: 0 < beta <= 1),
    "error_decay": ("of at least 0, at most 1", lambda decay: 0 <= decay <= 1),
    "server_momentum": ("of at least 0, below 1", lambda momentum: 0 <= momentum < 1),
    "weight_decay": ("of at least 0", lambda weight_decay: weight_decay >= 0),
}
OUTER_NUMBERS = {
    "outer_lr": ("above 0", lambda outer_lr: outer_lr > 0),
    "outer_momentum": ("of at least 0, below 1", lambda momentum: 0 <= momentum < 1),
    "error_decay": NUMBERS["error_decay"],
}
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


def plain(value: object) -> object:
    """The number of Python's that a tensor with one entry, or a number of NumPy's, holds.

    Anything else as it is. Waits for the device of a tensor.
    """
    if hasattr(value, "item"):
        with suppress(RuntimeError, TypeError, ValueError):  # of many entries, or without values
            return value.item()
    return value


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, float | int) and not isinstance(value, bool) and isfinite(value)


def choice(name: str, value: str, allowed) -> str:
    """The value, or ValueError if it is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: choose {', '.join(allowed)}")
    return value


def check_number(name: str, value: float, ranges: dict, where: str = "") -> float:
    """The value as `plain` has it, or ValueError unless it is a finite number in its range."""
    range_, holds = ranges[name]
    value = plain(value)
    if not (is_number(value) and holds(value)):
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
        raise ValueError(f"{name}={given} is not allowed: give a number {range_}{where}")
    return value


def whole_number(name: str, value: int, least: int) -> int:
    """The value as `plain` has it, or ValueError unless it is a whole number from `least` on."""
    value = plain(value)
    if not (type(value) is int and value >= least):
        range_ = "above 0" if least == 1 else f"of at least {least}"
        raise ValueError(f"{name}={value} is not allowed: give a whole number {range_}")
    return value


def flag(name: str, value: bool) -> bool:
    """The value, or ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not allowed: give True or False")
    return value


def check_group(group: dict) -> None:
    """Raise ValueError for an entry of a parameter group that is out of range.

    Its numbers are plain from here on, but for an lr that is a tensor, which others may write into.
    """
    for name in NUMBERS:
        if not (name == "radius" and isinstance(group[name], AdaptiveRadius)):
            number = check_number(name, group[name], NUMBERS, _where(group))
            if not (name == "lr" and isinstance(group[name], Tensor)):
                group[name] = number
    for name in ("nesterov", "transposed", "kernels", "lmo_feedback"):
        flag(name, group[name])
    if group["lmo_feedback"] and isinstance(group["radius"], AdaptiveRadius):
        raise ValueError(
            f"radius={group['radius']} is not allowed with lmo_feedback=True, whose steps are as "
            f"long as gradients are: give a number{_where(group)}"
        )
    _require_kind("norm", group, Norm)
    check_compressors(group)


def check_compressors(group: dict) -> None:
    """Raise ValueError where a group's w2s or s2w is no compressor."""
    _require_kind("w2s", group, Compressor, Switch)
    _require_kind("s2w", group, Compressor)


def _require_kind(name: str, group: dict, *kinds: type) -> None:
    if not isinstance(group[name], kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"{name}={group[name]!r} is not allowed: give a {names} of ef21_muon{_where(group)}"
        )


def _where(group: dict) -> str:
    return f" (group {group['name']})" if "name" in group else ""


def refuse_compressed_shifts(groups: list[dict]) -> None:
    """Raise ValueError for an s2w compressor where the servers send nothing back."""
    for group in groups:
        if not group["s2w"].lossless:
            raise ValueError(
                f"server='replicated' sends nothing back to compress with s2w={group['s2w']}: "
                "use s2w=identity, or server=sharded or rank0"
            )


def refuse_unused_decays(groups: list[dict], feedback: str) -> None:
    """Raise ValueError for a decay of what this kind of feedback does not have."""
    unused = {"ef21": {"error_decay": 1, "server_momentum": 0}, "none": {"error_decay": 1}}
    for name, neutral in unused.get(feedback, {}).items():
        for group in groups:
            if group[name] != neutral:
                raise ValueError(
                    f"{name}={group[name]} is not allowed with feedback={feedback!r}: leave it at "
                    f"{neutral}, or use feedback='ef14'"
                )


def require_ranks(ranks: int, group: dist.ProcessGroup | None) -> None:
    """Raise RuntimeError where torch.distributed was initialised after the optimizer was built."""
    _, now = place_in(group)
    if now != ranks:
        raise RuntimeError(
            f"there are {now} ranks where there were {ranks} when the optimizer was built, which "
            "would send nothing to the others: build it after torch.distributed.init_process_group"
        )


def require_same_groups(now: list[tuple], formed: list[tuple]) -> None:
    """Raise RuntimeError where groups are others than when the optimizer was built.

    now, formed: of every group its parameters, and its compressors by name.
    """
    if len(now) != len(formed):
        raise RuntimeError(
            f"there are {len(now)} parameter groups where there were {len(formed)} when the "
            "optimizer was built, which sends those: build it anew"
        )
    for index, (group, before) in enumerate(zip(now, formed, strict=True)):
        _require_same_group(index, group, before)


def _require_same_group(index: int, now: tuple, formed: tuple) -> None:
    """Raise RuntimeError for a parameter or a compressor that was put into a group afterwards.

    now, formed: the group's parameters, and its compressors by name.
    """
    (params, compressors), (params_before, compressors_before) = now, formed
    same = len(params) == len(params_before) and all(map(is_, params, params_before))
    if not same:
        raise RuntimeError(
            f"the parameters of group {index} are others than when the optimizer was built, which "
            "steps those: build it anew from the model's parameters"
        )
    for name, compressor in compressors.items():
        if compressor is not compressors_before[name]:
            raise RuntimeError(
                f"{name}={compressor} was put into group {index} after the optimizer was built "
                f"with {compressors_before[name]}: build it anew, or give a Switch for w2s"
            )


def require_same_state(state: dict, views: list[tuple[Tensor, str, Tensor]]) -> None:
    """Raise RuntimeError for state that was cleared or replaced since the optimizer was built.

    views: of every parameter the names of its state and the tensors that steps are taken with.
    """
    for parameter, key, tensor in views:
        if state.get(parameter, {}).get(key) is not tensor:
            raise RuntimeError(
                f"the state {key!r} of a parameter of shape {tuple(parameter.shape)} was cleared "
                "or replaced, which steps would not see: write into its tensors in place, load a "
                "state_dict, or build the optimizer anew, on all workers alike"
            )


def require_local_gradients(groups: list[dict]) -> None:
    """Raise RuntimeError where DistributedDataParallel has averaged the gradients already."""
    own = {id(parameter) for group in groups for parameter in group["params"]}
    wrappers = instances(DistributedDataParallel)
    if any(id(parameter) in own for one in wrappers for parameter in one.parameters()):
        raise RuntimeError(
            "the model is in DistributedDataParallel, which sends whole gradients beside the "
            "optimizer's messages: give forward and backward the model itself (of "
            "accelerate, and of transformers.Trainer, prepare all but the model)"
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
    mine = torch.cat([projection(batch.gradient_estimate) for batch in batches])
    every = [torch.empty_like(mine) for _ in range(ranks)]
    if ranks > 1:
        dist.all_gather(every, mine, group=group)
    else:
        every = [mine]
    means = torch.stack(every).mean(0).split([len(batch.names) for batch in batches])
    for batch, mean in zip(batches, means, strict=True):
        served = batch.owned
        error = (projection(batch.server_gradient) - mean[served]).abs()
        norms = torch.linalg.matrix_norm(batch.server_gradient)
        norms += torch.linalg.matrix_norm(batch.gradient_estimate[served])
        for name, wrong in zip(batch.names[served], (error > 1e-3 * norms).tolist(), strict=True):
            if wrong:
                raise ValueError(
                    f"the servers' gradient estimate of {name} is not the mean of the workers': "
                    "a worker's state was lost or damaged; go on from a checkpoint"
                )
