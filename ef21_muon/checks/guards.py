"""Guards of a step: they refuse it before anything changes, and report NaN and infinity later."""

import logging
import sys
import time
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ef21_muon.channel import mark
from ef21_muon.layers import Batch, Layer
from ef21_muon.transport.buffers import instances, warn_of_statistics
from ef21_muon.transport.fixed import ALONE, Group, place_in
from ef21_muon.transport.shards import is_sharded
from ef21_muon.transport.stragglers import StragglerMonitor
from ef21_muon.views import show_groups

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating

FIXED = ("w2s", "s2w")  # entries of a parameter group that may not be replaced
log = logging.getLogger("ef21_muon")
_GRAD = attrgetter("grad")


class GradientError(RuntimeError, ValueError):
    """A gradient is missing or does not fit its parameter."""


def guarded_step(
    optimizer: "Communicating", closure: Callable | None, take: Callable[[], None]
) -> Any:
    """Take a step on all workers together, after all checks that could refuse it.

    Args:
        optimizer: the optimizer, a `Communicating`.
        closure: computes the loss and the gradients, or None.
        take: takes the step.

    Returns:
        The loss of the closure, or None. If a scaled gradient overflowed, no step is taken.
    """
    loss = evaluate(closure)
    with torch.no_grad(), in_step(optimizer):
        optimizer.guards.before_step(optimizer)
        if overflowed(optimizer, optimizer.everyone):
            return loss
        with torch.autocast(optimizer.device.type, enabled=False):  # full precision
            take()
        optimizer.timer.phase(None)
        optimizer.steps += 1
        optimizer.begun = True
    return loss


def evaluate(closure: Callable | None) -> Any:
    """Return the loss that the closure of `step` computes, or None if there is no closure."""
    with torch.enable_grad():
        return closure() if closure else None


def in_step(optimizer: "Communicating") -> AbstractContextManager[None]:
    """Return a context in which a rank that waits for others in a step logs for whom it waits."""
    if optimizer.everyone == ALONE or place_in(optimizer.everyone)[1] == 1:
        return nullcontext()
    optimizer.stragglers = optimizer.stragglers or StragglerMonitor(optimizer.everyone)
    return optimizer.stragglers.step(optimizer.steps)


class Guards:
    """The checks of an optimizer's steps, which compare it with what it was built from.

    Args:
        optimizer: the optimizer, a `Communicating` with its batches.
        layers: the layers whose gradients this worker needs for a step, on all of its ranks.
    """

    def __init__(self, optimizer: "Communicating", layers: Sequence[Layer]):
        self.layers, self.ranks = layers, optimizer.ranks
        # Inner optimizers check their own.
        self.fixed = [one for one in FIXED if one in optimizer.RULE and not optimizer.inner]
        self.formed: list[tuple[Any, ...]] = [
            (list(g["params"]), *map(g.get, self.fixed)) for g in optimizer.param_groups
        ]
        state = optimizer.state.items()
        self.views = [(p, key, table) for p, own in state for key, table in own.items()]
        self.flags = [at for batch in optimizer.batches for at in broken_at(batch)]
        self.notice = Notice()

    def before_step(self, optimizer: "Communicating") -> None:
        """Check groups, state, ranks and gradients, and set missing gradients to zero if so asked.

        A gradient or message that was not finite in an earlier step is logged, once.

        Raises:
            RuntimeError: if groups, state or ranks are not those the optimizer was built with.
            GradientError: if a gradient is missing or does not fit.
        """
        if optimizer.wrapped:
            show_groups(optimizer)
        _, now = place_in(optimizer.process_group)
        if now != self.ranks:
            raise RuntimeError(
                f"there are {now} ranks where there were {self.ranks} when the optimizer was "
                "built, which would send nothing to the others: build it after "
                "torch.distributed.init_process_group"
            )
        for parameter, key, table in self.views:
            if optimizer.state.get(parameter, {}).get(key) is not table:
                raise RuntimeError(
                    f"the state {key!r} of a parameter of shape {tuple(parameter.shape)} was "
                    "cleared or replaced, which steps would not see: write into its tensors in "
                    "place, load a state_dict, or build the optimizer anew, on all workers alike"
                )
        self._require_groups(optimizer.param_groups)
        if optimizer.steps == 0 and self.ranks > 1:
            require_local_gradients(optimizer.param_groups)
        if optimizer.steps == 0 and place_in(optimizer.everyone)[1] > 1:
            warn_of_statistics(self.layers, optimizer.buffers.module)
        bring_gradients(self.layers, type(optimizer).__name__)
        if self.notice.look(self.flags):
            try:
                optimizer.check_finite()
            except FloatingPointError as error:
                rank, _ = place_in(optimizer.everyone)
                log.warning("rank %d: %s (check_finite() raises this: end the run)", rank, error)

    def _require_groups(self, groups: list[dict]) -> None:
        """Raise RuntimeError if parameters or compressors of groups have been replaced."""
        if len(groups) != len(self.formed):
            raise RuntimeError(
                f"there are {len(groups)} parameter groups where there were {len(self.formed)} "
                "when the optimizer was built, which sends those: build it anew"
            )
        for index, (group, (params, *compressors)) in enumerate(
            zip(groups, self.formed, strict=True)
        ):
            now = group["params"]
            if not (len(now) == len(params) and all(map(is_, now, params))):
                raise RuntimeError(
                    f"the parameters of group {index} are others than when the optimizer was "
                    "built, which steps those: build it anew from the model's parameters"
                )
            for entry, compressor in zip(self.fixed, compressors, strict=True):
                if group.get(entry) is not compressor:
                    raise RuntimeError(
                        f"{entry}={group[entry]} was put into group {index} after the optimizer "
                        f"was built with {compressor}: call exchange_compressor on all ranks, or "
                        "build it anew"
                    )


def require_local_gradients(groups: list[dict]) -> None:
    """Raise RuntimeError if DistributedDataParallel has averaged the gradients already."""
    own = {id(parameter) for group in groups for parameter in group["params"]}
    wrappers = instances(DistributedDataParallel)
    if any(id(parameter) in own for one in wrappers for parameter in one.parameters()):
        raise RuntimeError(
            "the model is in DistributedDataParallel, which sends whole gradients beside the "
            "optimizer's messages: give forward and backward the model itself (of "
            "accelerate, and of transformers.Trainer, prepare all but the model)"
        )


def bring_gradients(layers: Sequence[Layer], optimizer: str) -> None:
    """Set missing gradients to zero where that was asked for, and check the others.

    Errors are raised before anything changes, since other workers would wait for the message.

    Args:
        layers: the layers whose gradients the step needs.
        optimizer: the name of the optimizer's class, for errors.

    Raises:
        GradientError: for a gradient that is missing where an error was asked for, one that does
            not fit, and if all gradients are missing.
    """
    zero, missing = [], 0
    for layer in layers:
        gradient, parameter = layer.parameter.grad, layer.parameter
        if gradient is None:
            missing += 1
            if layer.missing_grad == "zero":
                zero.append(parameter)
            elif layer.missing_grad == "error":
                _refuse_missing(layer, optimizer)
        elif layer.missing_grad != "skip":
            fits = gradient.shape == parameter.shape and gradient.numel() == layer.entries
            if not (fits and gradient.is_floating_point() and gradient.layout == torch.strided):
                _refuse_unfit(layer, gradient, optimizer)
    if zero and missing == len(layers):
        raise GradientError(
            f"none of the parameters of {optimizer} has a gradient, {layers[0].name} the first: "
            f"missing_grad='zero' is for some of them; {_how_to_bring(layers[0])}, or give zeros "
            "for a batch that reaches none"
        )
    for parameter in zero:
        parameter.grad = torch.zeros_like(parameter)


def _refuse_missing(layer: Layer, optimizer: str) -> None:
    """Raise GradientError for a missing gradient."""
    raise GradientError(
        f"{layer.name} has no gradient: every parameter given to {optimizer} takes part in every "
        f"step; {_how_to_bring(layer)}, leave out parameters that the loss never reaches, and give "
        "EF21Muon or AveragedGradients missing_grad='zero' for those that only some batches reach"
    )


def _refuse_unfit(layer: Layer, gradient: Tensor, optimizer: str) -> None:
    """Raise GradientError for a gradient whose layout, shape or dtype does not fit."""
    if gradient.layout != torch.strided:
        raise GradientError(
            f"the gradient of {layer.name} is sparse ({gradient.layout}): {optimizer} takes whole "
            "ones; build its module with sparse=False, or leave it to another optimizer"
        )
    raise GradientError(
        f"the gradient of {layer.name} has shape {tuple(gradient.shape)} and type {gradient.dtype}"
        ": give floating-point numbers, and the shape that the parameter had when "
        f"{optimizer} was built"
    )


def _how_to_bring(layer: Layer) -> str:
    """Return what the user has to call so that the layer has its gradient."""
    if is_sharded(layer.parameter):
        return "call set_requires_gradient_sync(True) before the last loss.backward() of a step"
    return "call loss.backward() before step()"


def overflowed(optimizer: "Communicating", group: Group) -> bool:
    """Undo a GradScaler's scale, and return whether a gradient on any rank of the group overflowed.

    If one did, no rank may step, or the ranks would be in different rounds. It waits for the
    device, but only with a GradScaler.
    """
    found_inf = vars(optimizer).get("found_inf")
    if found_inf is None:
        return False
    mesh = optimizer.mesh
    if mesh and mesh.sharded:
        raise RuntimeError(
            "GradScaler does not see the gradients of a sharded model: train in bfloat16, "
            "which needs no scaling"
        )
    held = [layer.parameter for layer in optimizer.guards.layers]
    gradients = [p.grad for p in held if p.grad is not None]
    scale = vars(optimizer).get("grad_scale")
    if scale is not None:
        torch._foreach_mul_(gradients, 1 / scale)
    if mesh:  # the scaler has seen only the gradients of this rank
        norms = torch.stack(torch._foreach_norm(gradients, float("inf")))
        found_inf = (~norms.isfinite()).any().float()
    if group != ALONE and place_in(group)[1] > 1:
        found_inf = found_inf.clone()
        dist.all_reduce(found_inf, group=group)
    if mesh and found_inf:  # a step would have released them too
        for parameter in held:
            parameter.grad = None
    return bool(found_inf)


def gradients_of(batch: Batch, step: int) -> list[Tensor]:
    """Return this worker's gradients, float32 (m, n) each; mark those that are not finite."""
    gradients = batch.matrices(map(Tensor.float, map(_GRAD, batch.params)))
    finite = torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite()
    mark(batch.broken_at, ~finite, step)
    return gradients


def broken_at(batch: Batch) -> list[Tensor]:
    """Return a batch's tables of the first steps whose gradient or message was not finite."""
    up = getattr(batch, "up", None)
    return [batch.broken_at] if up is None else [batch.broken_at, up.broken_at]


class Notice:
    """Finds out whether a flag on the device is set, some steps later, so that no step waits."""

    def __init__(self):
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._said = False

    def __reduce__(self) -> tuple:
        return Notice, ()  # a copy starts afresh, since events belong to this process

    def look(self, flags: Sequence[Tensor]) -> bool:
        """Return whether a flag was set when an earlier call started a copy; start the next copy.

        It returns True only once.
        """
        if self._said or (self._arrived is not None and not self._arrived.query()):
            return False
        self._said = self._copy is not None and any(self._copy.tolist())
        now = torch.cat(list(flags))
        if now.is_cuda:
            self._copy = torch.empty(now.shape, dtype=now.dtype, pin_memory=True)
            self._copy.copy_(now, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._copy = now
        return self._said


class UnsentSteps:
    """Warns if an optimizer is dropped, or the process ends, with local steps that were never sent.

    `steps` counts these steps. Saving a state sets it to 0, since the state holds them. There is no
    warning after an error, and none on ranks other than 0.

    Args:
        optimizer: the optimizer that takes the steps; this object does not keep it alive.
        rank: the rank of this process.
    """

    def __init__(self, optimizer: object, rank: int):
        self.steps = 0
        if rank == 0:
            weakref.finalize(optimizer, self._warn)

    def _warn(self) -> None:
        """Warn if there are unsent steps and no error has ended the program."""
        failed = sys.exc_info()[0] is not None or getattr(sys, "last_value", None) is not None
        if self.steps and not failed:
            warnings.warn(
                f"the last {self.steps} local steps were never sent, and W is without them: call "
                "final_sync() after the last step, on all workers",
                stacklevel=2,
            )


class PhaseTimer:
    """Measures the seconds of named phases: `with timer("data"): ...`, or between calls of `phase`.

    Args:
        device: the device of the work. On CUDA phases are timed by events on the current stream,
            which only `read()` waits for; of events that nobody reads the last 10,000 are kept.
            None: nothing is timed.
    """

    def __init__(self, device: torch.device | None):
        self.device = device
        self._open: tuple[str, Any] | None = None  # since an event or, on the CPU, a time
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=10_000)

    def __reduce__(self) -> tuple:
        return PhaseTimer, (self.device,)  # a copy starts at zero

    def phase(self, name: str | None) -> None:
        """Start a phase, which ends the one before; None only ends it."""
        if self.device is None:
            return
        on_cuda = self.device.type == "cuda"
        now: Any = torch.cuda.Event(enable_timing=True) if on_cuda else time.perf_counter()
        if on_cuda:
            now.record()
        if self._open:
            before, since = self._open
            if on_cuda:
                self._events.append((before, since, now))
            else:
                self._seconds[before] += now - since
        self._open = (name, now) if name else None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what happens within the context as a phase."""
        self.phase(phase)
        yield
        self.phase(None)

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call. Waits for the device."""
        for phase, start, stop in self._events:
            stop.synchronize()
            self._seconds[phase] += start.elapsed_time(stop) / 1000
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds
