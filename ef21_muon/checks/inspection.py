"""Checks of a running optimizer: the loss of its messages, finite steps, agreement of workers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ef21_muon.checks.arithmetic import SAFE
from ef21_muon.checks.guards import broken_at
from ef21_muon.layers import Batch
from ef21_muon.transport.agreement import (
    DIVERGED,
    require_equal_groups,
    require_equal_parameters,
    require_finite,
    require_mean_estimate,
)

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating


def losses(batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """Report what compression did to each layer, as `Communicating.diagnostics` has it.

    Args:
        batches: layers whose last messages were recorded.
    """
    result = {}
    for batch in batches:
        if batch.up.contraction is None or batch.up.estimator_error is None:
            continue  # not recorded
        columns = batch.up.contraction.tolist(), batch.up.estimator_error.tolist()
        for name, contraction, error in zip(batch.names, *columns, strict=True):
            result[name] = {"w2s_contraction": contraction, "estimator_error": error}
        errors = batch.shift_error()
        for name, error in zip(batch.names[batch.owned], errors, strict=True):
            result[name]["model_shift_error"] = error
    return result


def require_finite_steps(batches: Sequence[Batch], broken_gradient: str) -> None:
    """Raise FloatingPointError for the first step whose gradient or message was not finite.

    Args:
        batches: layers, with the steps at which they broke.
        broken_gradient: error for a gradient, with places for the layer's name and the step.
    """
    broken = [
        (step, kind, name)
        for batch in batches
        for kind, at in enumerate(broken_at(batch))
        for step, name in zip(at.tolist(), batch.names, strict=True)
        if step
    ]
    if broken:
        step, kind, name = min(broken)
        what = (broken_gradient, "this worker's message of {} was not finite at step {}")[kind]
        raise FloatingPointError(
            f"{what.format(name, step)}: lower the learning rate or look at that step's data"
        )


def require_agreement(
    optimizer: "Communicating", shared: Sequence[tuple[str, Tensor]], problem: str | None = None
) -> None:
    """Raise an error, on all ranks, unless workers hold alike what they have to.

    Args:
        optimizer: a Communicating.
        shared: what all workers hold alike, by name.
        problem: what was not finite on this worker; None if all was.

    Raises:
        ValueError: names the rank, and the layer or group, that differs.
        FloatingPointError: for what was not finite on any worker.
    """
    group = optimizer.process_group
    require_finite(problem, optimizer.everyone)
    if optimizer.mesh:
        optimizer.mesh.gather_parameters()
    require_equal_groups(optimizer.param_groups, group)
    elsewhere = "give server=sharded or rank0, " if optimizer.server == "replicated" else ""
    advice = f"{elsewhere}give {SAFE}, or " if optimizer.server else ""
    require_equal_parameters(shared, group, DIVERGED.format(advice))
    late = {id(batch) for batch in optimizer.under_way}
    arrived = [one for one in optimizer.batches if optimizer.server and id(one) not in late]
    if known := [one for one in arrived if one.up.feedback == "ef21"]:
        require_mean_estimate(known, group)
