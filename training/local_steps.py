"""Builds LocalSteps and its inner optimizers from a configuration."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial

from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

from baselines import Muon
from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.communicating import Communicating
from ef21_muon.transport.fixed import Transport
from training.causes import explained
from training.config import build
from training.workers import RunError, one_line

OTHERS = "others"  # the key of an inner optimizer for the roles that no other one has


def build_local_steps(
    config: DictConfig, make: partial, groups: list[dict], place: dict
) -> LocalSteps:
    """Build LocalSteps.

    Args:
        config: the configuration of the run.
        make: a partial of LocalSteps whose `inner` is a partial, or a partial for each role.
        groups: the parameter groups.
        place: the process group or the mesh, and the transport if it is not the usual one.

    Raises:
        RunError: for an inner optimizer that cannot be built.
    """
    mesh = place.get("mesh")
    own = mesh.share(groups) if mesh else groups
    compressors = {
        direction: {
            group["name"]: group.get(direction, build(config[direction], direction))
            for group in groups
        }
        for direction in ("w2s", "s2w")
    }
    options = dict(make.keywords)
    shares = _shares(options.pop("inner", None), own)
    with mesh.together() if mesh else nullcontext():
        inner = [_build_inner(*share, config.seed, place.get("transport")) for share in shares]
    return make.func(inner, seed=config.seed, **compressors, **place, **options)


def _shares(inner: object, groups: list[dict]) -> Iterator[tuple[str, partial, list[dict]]]:
    """Every inner optimizer's key, partial and groups."""
    if isinstance(inner, partial):
        yield "optimizer.inner", inner, groups
        return
    if not (isinstance(inner, Mapping) and all(isinstance(one, partial) for one in inner.values())):
        raise RunError(
            "optimizer.inner describes no optimizer: give optimizer.inner._target_=CLASS with "
            f"_partial_: true, or one for each of the roles and for {OTHERS!r}"
        )
    for role, maker in inner.items():
        chosen = [
            group
            for group in groups
            if group["name"] == role or (role == OTHERS and group["name"] not in inner)
        ]
        if chosen:
            yield f"optimizer.inner.{role}", maker, chosen


def _build_inner(
    key: str, maker: partial, groups: list[dict], seed: int, transport: Transport | None
) -> Optimizer:
    options = {}
    if issubclass(maker.func, Communicating):
        options = {"process_group": ALONE, "seed": seed}
        if transport and not transport.sends:  # a dry run: inner optimizers send nothing either
            options["transport"] = Transport(rank=0, ranks=1)
    try:
        with explained(key):
            return maker([stepped_by(maker.func, group) for group in groups], **options)
    except (TypeError, ValueError) as error:
        raise RunError(f"{key}: {one_line(error)}") from error


def stepped_by(method: type, group: dict) -> dict:
    """The entries of a group for an optimizer that sends nothing itself: no compressors."""
    rule = ("norm", "radius", "lmo_feedback") if issubclass(method, EF21Muon | Muon) else ()
    return {entry: group[entry] for entry in ("name", "params", *rule) if entry in group}


def inner_tensors(optimizer: Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Every tensor in the inner optimizers' state, as (parameter, name, tensor)."""
    for inner in optimizer.inner:
        for parameter, state in inner.state.items():
            for key, tensor in state.items():
                yield parameter, key, tensor
