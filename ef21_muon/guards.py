"""Guards of a step: what is refused before anything changes, and what is said of it later."""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter, is_

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ef21_muon.layers import Batch, Layer, mark
from ef21_muon.transport.buffers import instances, warn_of_statistics
from ef21_muon.transport.fixed import place_in
from ef21_muon.transport.shards import is_sharded
from ef21_muon.transport.stragglers import StragglerMonitor

FIXED = ("w2s", "s2w")  # entries of a parameter group that batches are formed by
log = logging.getLogger("ef21_muon")
_GRAD = attrgetter("grad")


class GradientError(RuntimeError, ValueError):
    """A gradient is missing or does not fit its parameter."""


def guarded_step(optimizer, closure: Callable | None, take: Callable[[], None]):
    """A step that is `take`, on all workers together, after all that could refuse it; the loss."""
    loss = evaluate(closure)
    with torch.no_grad(), in_step(optimizer):
        optimizer.guards.before_step(optimizer)
        if overflowed(optimizer, optimizer.everyone):
            return loss
        with torch.autocast(optimizer.device.type, enabled=False):  # products are of full precision
            take()
        optimizer.timer.phase(None)
        optimizer.steps += 1
        optimizer.begun = True
    return loss


def evaluate(closure: Callable | None):
    """The loss that a closure of `step` gives, None without one."""
    with torch.enable_grad():
        return closure() if closure else None


def in_step(optimizer) -> AbstractContextManager[None]:
    """Where others may wait for this rank, and this for others, which is then said."""
    if place_in(optimizer.everyone)[1] == 1:
        return nullcontext()
    optimizer.stragglers = optimizer.stragglers or StragglerMonitor(optimizer.everyone)
    return optimizer.stragglers.step(optimizer.steps)


class Guards:
    """What an optimizer was built of, which steps look at.

    layers: whose gradients this worker brings to a step, of all its ranks.
    """

    def __init__(self, optimizer, layers: Sequence[Layer]):
        self.layers, self.ranks = layers, optimizer.ranks
        # Those of inner optimizers are looked at by these.
        self.fixed = [one for one in FIXED if one in optimizer.RULE and not optimizer.inner]
        self.formed = [(list(g["params"]), *map(g.get, self.fixed)) for g in optimizer.param_groups]
        state = optimizer.state.items()
        self.views = [(p, key, table) for p, own in state for key, table in own.items()]
        self.flags = [at for batch in optimizer.batches for at in broken_at(batch)]
        self.notice = Notice()

    def before_step(self, optimizer) -> None:
        """Raise RuntimeError where groups, state, processes or gradients do not fit a step.

        Missing gradients are zero where that was asked for. What was not finite is said once.
        """
        if optimizer.wrapped:
            optimizer.show_groups()
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
    """Raise RuntimeError where DistributedDataParallel has averaged the gradients already."""
    own = {id(parameter) for group in groups for parameter in group["params"]}
    wrappers = instances(DistributedDataParallel)
    if any(id(parameter) in own for one in wrappers for parameter in one.parameters()):
        raise RuntimeError(
            "the model is in DistributedDataParallel, which sends whole gradients beside the "
            "optimizer's messages: give forward and backward the model itself (of "
            "accelerate, and of transformers.Trainer, prepare all but the model)"
        )


def bring_gradients(layers: Sequence[Layer], optimizer: str) -> None:
    """Put zeros in place of missing gradients where that was asked for.

    Raises GradientError before anything changes, since other workers would wait for the message,
    for a gradient that is missing otherwise or does not fit, and where all are missing.
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
                _refuse_unfit(layer, optimizer)
    if zero and missing == len(layers):
        raise GradientError(
            f"none of the parameters of {optimizer} has a gradient, {layers[0].name} the first: "
            f"missing_grad='zero' is for some of them; {_how_to_bring(layers[0])}, or give zeros for a "
            "batch that reaches none"
        )
    for parameter in zero:
        parameter.grad = torch.zeros_like(parameter)


def _refuse_missing(layer: Layer, optimizer: str) -> None:
    raise GradientError(
        f"{layer.name} has no gradient: every parameter given to {optimizer} takes part in every "
        f"step; {_how_to_bring(layer)}, leave out those that the loss does not reach (EF21Muon "
        "and AveragedGradients take missing_grad='zero' for those that it reaches at times)"
    )


def _refuse_unfit(layer: Layer, optimizer: str) -> None:
    gradient = layer.parameter.grad
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
    if is_sharded(layer.parameter):
        return "call set_requires_gradient_sync(True) before the last loss.backward() of a step"
    return "call loss.backward() before step()"


def overflowed(optimizer, group: dist.ProcessGroup | str | None) -> bool:
    """Undo a GradScaler's scale; whether a scaled gradient of any rank of the group overflowed.

    Then no rank may step, or rounds would slip against each other. Waits for the device, with a
    GradScaler alone.
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
    if mesh:  # of which the scaler has seen this rank's alone
        norms = torch.stack(torch._foreach_norm(gradients, float("inf")))
        found_inf = (~norms.isfinite()).any().float()
    if place_in(group)[1] > 1:
        found_inf = found_inf.clone()
        dist.all_reduce(found_inf, group=group)
    if mesh and found_inf:  # as a step lets go of them
        for parameter in held:
            parameter.grad = None
    return bool(found_inf)


def gradients_of(batch: Batch, step: int) -> list[Tensor]:
    """Of this worker, float32 (m, n) each; those that are not finite are marked."""
    gradients = batch.matrices(map(Tensor.float, map(_GRAD, batch.params)))
    finite = torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite()
    mark(batch.broken_at, ~finite, step)
    return gradients


def broken_at(batch: Batch) -> list[Tensor]:
    """Of a batch the first steps whose gradients, and whose messages, were not finite."""
    up = getattr(batch, "up", None)
    return [batch.broken_at] if up is None else [batch.broken_at, up.broken_at]


class Notice:
    """Whether any of some flags is set, read some steps later, so that no step waits for it."""

    def __init__(self):
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._said = False

    def __reduce__(self) -> tuple:
        return Notice, ()  # a copy begins anew, since events are of this process

    def look(self, flags: Sequence[Tensor]) -> bool:
        """True, once, where a flag was set when an earlier look started a copy; starts the next."""
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


class PhaseTimer:
    """Seconds spent in named phases: `with timer("data"): ...`, or between calls of `phase`.

    device: on CUDA a phase is timed by events on the current stream, which are read only by
    `read()`; of the phases that nobody reads the last 10,000 are kept. None: nothing is timed.
    """

    def __init__(self, device: torch.device | None):
        self.device = device
        self._open: tuple[str, float | torch.cuda.Event] | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=10_000)

    def __reduce__(self) -> tuple:
        return PhaseTimer, (self.device,)  # a copy begins at zero

    def phase(self, name: str | None) -> None:
        """What passes from here on is of this phase; with None it is of none."""
        if self.device is None:
            return
        on_cuda = self.device.type == "cuda"
        now = torch.cuda.Event(enable_timing=True) if on_cuda else time.perf_counter()
        if on_cuda:
            now.record()
        if self._open:
            before, since = self._open
            if on_cuda:
                self._events.append((before, since, now))
            else:
                self._seconds[before] += now - since
        self._open = name and (name, now)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase(phase)
        yield
        self.phase(None)

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last call. Waits for the device."""
        for phase, start, stop in self._events:
            stop.synchronize()
            self._seconds[phase] += start.elapsed_time(stop) / 1000
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds
