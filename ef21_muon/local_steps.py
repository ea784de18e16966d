"""Local steps: workers step by themselves, and meet in rounds."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ef21_muon.checks import (
    OUTER_NUMBERS,
    check_number,
    choice,
    flag,
    refuse_unused_decays,
    whole_number,
)
from ef21_muon.communicating import CommunicatingOptimizer
from ef21_muon.exchange.collectives import ALONE, place_in
from ef21_muon.exchange.gradients import Layer, bring_gradients
from ef21_muon.exchange.lanes import Lanes
from ef21_muon.exchange.layers import (
    RoundBatch,
    finite,
    mark,
    named_layers,
    serve,
    still_where_broken,
)
from ef21_muon.exchange.phases import Phase, new_phases
from ef21_muon.exchange.rounds import Rounds
from ef21_muon.exchange.timetable import Timetable
from ef21_muon.inner import missing_of, require_a_gradient, take_over
from ef21_muon.messages.compressors import Identity
from ef21_muon.messages.feedback import FEEDBACK
from ef21_muon.rules import S2W, W2S, starts_of
from ef21_muon.senders import add_mean_over_senders, check_mean, require_marks
from ef21_muon.wrapping import WrappingOptimizer


class LocalSteps(WrappingOptimizer):
    """Workers take `every` steps of an inner optimizer, and then average what these have changed.

    DiLoCo (Douillard et al., arXiv:2311.08105) around any torch optimizer, with compressed messages
    (MuLoCo, arXiv:2505.23725; SparseLoCo, arXiv:2508.15706) and the servers of EF21Muon. After
    `every` calls of `step()` comes a round:

        worker:   D_j = W - x_j + error_decay e_j;  R_j = C_j(D_j);  e_j = D_j - R_j
        server:   g = mean of R_j;  V = outer_momentum V + g
                  S = C(outer_lr (g + outer_momentum V) + e_s);  e_s = what S lost
        worker:   W = W - S;  x_j = W

    with outer_lr V in place of the sum without `nesterov`. The parameters are this worker's x_j;
    `agreed()` puts W in their place, which is bit-identical on all workers and is what to evaluate
    and to save. Gradients are local: do not wrap the model in DistributedDataParallel.

    every: a number of steps, or {first step: number} where rounds change, as {0: 120, 360: 60}.
    inner: an optimizer, or several of different parameters, that sends nothing, as torch's own, or
    EF21Muon with process_group=ALONE. `param_groups` are theirs, so schedulers act on their lr.
    w2s, s2w: as in EF21Muon, or a mapping from the names of groups. `feedback`: "ef14" as above;
    "ef21", R_j = C_j(W - x_j - G_j), G_j = G_j + R_j, g = g + mean of R_j; or "none". `server` and
    `buckets` are as in EF21Muon. mean: "all" as above, or with sparse messages "senders", where g
    has of every entry the mean over the workers that have sent it (SparseLoCo), 0 where none has.
    Of messages that have all entries both are the same.

    buffers: the model, whose floating-point buffers, as the running statistics of BatchNorm, become
    the mean of all workers' in every round, and within `agreed()` are those of the last one.

    With `stagger` every batch of layers has a turn of its own in the round, so that a link is used
    evenly, and with `delay` a message travels for as many steps each way while the training goes on
    (Streaming DiLoCo, arXiv:2501.18512): x_j then moves by W less the x_j of the turn, which keeps
    the steps since. `lanes`: of the ranks of a worker, where it has several; gradients are averaged
    inside of it in every step, and inner optimizers hold the parameters of this rank's lane. A root
    of `fully_shard` needs reshard_after_forward=True, or it goes on with W after `agreed()`. There
    a parameter without a gradient is refused, or zero where its inner optimizer has missing="zero".

    Memory: W and e_j, 8 bytes for each float32 parameter; on the rank that serves it 4 for V, and 4
    for e_s where s2w loses anything. A delay takes 4 more and the messages under way.

    A worker alone with lossless messages, an `outer_lr` of 1 and no momentum is its inner
    optimizer. Raises ValueError for options out of range, for an inner optimizer that sends, that
    is a LocalSteps or needs a closure, for parameters that differ between ranks, and where ranks
    get other bits of the same messages and all decode them; from the first
    `step` ValueError where the inner state is not made of float tensors, and RuntimeError where no
    parameter has a gradient.
    """

    BROKEN = "{} is not finite after step {}"
    NOT_COPIED = (*WrappingOptimizer.NOT_COPIED, "_sent", "_returned")
    _sent = _returned = MappingProxyType({})  # under way to the servers, and back, by bucket

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        every: int | Mapping[int, int] = 30,
        *,
        w2s: W2S | None = None,
        s2w: S2W | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nesterov: bool = True,
        feedback: str = "ef14",
        error_decay: float = 1.0,
        mean: str = "all",
        server: str = "auto",
        buckets: int = 4,
        stagger: bool = False,
        delay: int = 0,
        seed: int = 0,
        buffers: nn.Module | None = None,
        lanes: Lanes | None = None,
        process_group: dist.ProcessGroup | str | None = None,
    ):
        self.every, self.rounds = every, Rounds(every)
        self.delay = whole_number("delay", delay, least=0)
        self.outer_lr = check_number("outer_lr", outer_lr, OUTER_NUMBERS)
        self.outer_momentum = check_number("outer_momentum", outer_momentum, OUTER_NUMBERS)
        self.error_decay = check_number("error_decay", error_decay, OUTER_NUMBERS)
        self.nesterov, self.lanes = flag("nesterov", nesterov), lanes
        self.stagger = flag("stagger", stagger)
        buckets = whole_number("buckets", buckets, least=1)
        self.feedback = FEEDBACK[choice("feedback", feedback, FEEDBACK)]
        refuse_unused_decays([{"error_decay": self.error_decay, "server_momentum": 0}], feedback)
        self.mean = check_mean(mean, feedback)
        w2s, s2w = w2s or Identity(), s2w or Identity()
        with lanes.together() if lanes else nullcontext():
            place = {"process_group": process_group, "buffers": buffers}
            super().__init__(inner, w2s, s2w, seed=seed, **place)
            costs = [parameter.numel() for _, _, parameter, _ in named_layers(self.rules)]
            self._place_servers(server, self.rules, costs)
            batches = self._new_batches(costs)
            self.phases = self._new_phases(batches, starts_of(w2s), buckets, stagger)
            if mean == "senders":
                require_marks(self.phases, batches)
            self.timetable = Timetable(self.phases, self.rounds, delay, stagger)
            for b, batch in enumerate(batches if delay else ()):
                size = max(phase.w2s[b].payload_bytes(*batch.shape) for phase in self.phases)
                batch.keep_messages(size, both_ways=self.timetable.ways == 2)
            self._begin(batches)
        if lanes:
            lanes.name(self._layers)
            self.timetable.sum_over(lanes)
        self._sent, self._returned = {}, {}

    def _new_batches(self, costs: list[int]) -> list[RoundBatch]:
        place = place_in(self.process_group)
        batches = serve(RoundBatch, self.rules, costs, self.server, *place)
        for batch in batches:
            batch.make_room(self.feedback.accumulates, self.outer_momentum)
        return batches

    def _new_phases(
        self, batches: list[RoundBatch], begins: set[int], buckets: int, stagger: bool
    ) -> list[Phase]:
        of_batches = [self.rules[batch.group]["w2s"] for batch in batches]
        phases = new_phases(batches, of_batches, begins, buckets, self.process_group)
        if stagger:
            apart = [range(b, b + 1) for b in range(len(batches))]
            phases = [replace(phase, buckets=apart) for phase in phases]
        return phases

    @property
    def round(self) -> int:
        """Whole rounds so far."""
        return self.rounds.of(self.steps)[0]

    @torch.no_grad()
    def step(self, closure=None):
        """A step of the inner optimizer, and what is due after it of a round."""
        self.require_own_parameters("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._in_step():
            self._require_as_built()
            if not self.lanes:
                require_a_gradient(self.param_groups)
            bring_gradients(self._brought, type(self).__name__)
            self._take_over()
            self._look_back()
            # A worker whose gradient overflowed does without this step; its own ranks do alike.
            overflowed = self._overflowed(self.lanes.worker if self.lanes else ALONE)
            if self.lanes:
                with self.timer("exchange"):
                    self.lanes.reduce_gradients()
            if not overflowed:
                self._step_inner()
            with self._own_precision():
                self._depart(*self.timetable.departing(self.steps))
                self._arrive(self.steps)
            self.traffic += self.timetable.sent(self.steps)
            _, place, length = self.rounds.of(self.steps)
            if place == length - 1:
                self.traffic += self._average_buffers()
            self.steps += 1
            if self.lanes:
                with self.timer("exchange"):
                    self.lanes.share_parameters()
            take_over(self.inner)
        return loss

    def _take_over(self) -> None:
        """W of a model that was loaded before the first step."""
        if self.steps == 0:
            for batch in self.batches:
                batch.take_over()

    @torch.no_grad()
    def finish(self) -> None:
        """Tell of the steps since the last round too: W then has all that the workers did.

        For the end of a training, on all workers together. What is under way arrives first.
        """
        self.require_own_parameters("finish()")
        if self.steps == 0:
            return
        last, delay = self.steps - 1, self.timetable.delay
        for later in range(last + 1, last + 1 + self.timetable.ways * delay):
            self._arrive(later, at_servers=later <= last + delay)
        phase, just_told = self.timetable.departing(last)
        buckets = [bucket for bucket in phase.buckets if bucket not in just_told]
        self._depart(phase, buckets)
        for bucket in buckets:
            self._return(phase, bucket)
        for bucket in buckets:
            self._land(phase, bucket)
        self.traffic += self.timetable.taken(phase, buckets) + self._average_buffers()
        if self.lanes:
            self.lanes.share_parameters()

    @cached_property
    def _layers(self) -> list[Layer]:
        """Where an inner optimizer skips what has no gradient, a worker of several ranks cannot."""
        missing, otherwise = missing_of(self.inner), "refuse" if self.lanes else "skip"
        layers = super()._layers
        return [one._replace(missing=missing.get(one.parameter, otherwise)) for one in layers]

    def _depart(self, phase: Phase, buckets: list[range]) -> None:
        for bucket in buckets:
            self._sent[bucket] = self._to_servers(phase, bucket)

    def _arrive(self, step: int, at_servers: bool = True) -> None:
        if at_servers:
            phase, buckets = self.timetable.arriving(step, ways=1)
            for bucket in buckets:
                self._return(phase, bucket)
            self.traffic += self.timetable.returned(step)
        phase, buckets = self.timetable.arriving(step, self.timetable.ways)
        for bucket in buckets:
            self._land(phase, bucket)

    def _return(self, phase: Phase, bucket: range) -> None:
        """At the servers. After an interruption what was under way is sent again."""
        receive = self._sent.pop(bucket, None)
        if receive is None:
            messages = []
            for b in bucket:
                batch = self.batches[b]
                batch.w2s = phase.w2s[b]
                messages.append(batch.message[:, : batch.w2s.payload_bytes(*batch.shape)])
            receive = phase.exchange.to_servers(messages, bucket)
        self._returned[bucket] = self._to_workers(phase, bucket, receive)

    def _land(self, phase: Phase, bucket: range) -> None:
        """At the workers."""
        receive = self._returned.pop(bucket, None)
        if receive is None:
            messages = [self.batches[b].server_message for b in bucket]
            receive = phase.exchange.to_workers(messages, bucket)
        self._to_parameters(bucket, receive)

    def _worker_message(self, batch: RoundBatch) -> Tensor:
        local_models = batch.local_models()
        mark(batch.broken_at, ~finite(local_models), self.steps + 1)
        wide = torch.promote_types(local_models.dtype, torch.float32)
        difference = (batch.model_shift.to(wide) - local_models).float()
        message = self._compress(batch, difference, batch.memory, self.error_decay)
        if batch.departure is not None:
            batch.departure.copy_(local_models)
            batch.message[:, : message.shape[1]].copy_(message)
        return message

    def _receive(self, batch: RoundBatch, from_workers: tuple[Tensor, ...]) -> None:
        batch.outer_gradient = batch.server_gradient
        if not self.feedback.accumulates:
            batch.outer_gradient = batch.zeros(batch.owned)
        self._add_mean(batch, batch.outer_gradient, from_workers)

    def _add_mean(self, batch: RoundBatch, total: Tensor, from_workers: tuple[Tensor, ...]) -> None:
        if self.mean == "all" or not add_mean_over_senders(batch, total, from_workers):
            super()._add_mean(batch, total, from_workers)

    def _server_message(self, batch: RoundBatch) -> Tensor:
        direction, batch.outer_gradient = batch.outer_gradient, None
        if batch.server_momentum is not None:
            batch.server_momentum.mul_(self.outer_momentum).add_(direction)
            momentum = batch.server_momentum
            if self.nesterov:
                momentum = direction + self.outer_momentum * momentum  # not fused, as some would
            direction = momentum
        shift = self.outer_lr * direction
        if batch.server_error is not None:
            shift += batch.server_error
        still_where_broken(shift, direction)
        message = batch.s2w.encode(shift, self.generators["s2w"])
        if batch.server_error is not None:
            batch.server_error.copy_(shift).sub_(batch.s2w.decode(message, *batch.shape))
        if batch.server_message is not None:
            batch.server_message.copy_(message)
        return message

    def _update(self, batch: RoundBatch, received: Tensor) -> None:
        if self._is_its_inner(batch):
            told = batch.told()
            broken = ~finite(told)[:, None, None]
            batch.model_shift.copy_(torch.where(broken, batch.model_shift, told))
            return
        batch.model_shift -= received
        if batch.departure is None:
            torch._foreach_copy_(batch.params, batch.as_parameters(batch.model_shift))
        else:
            moves = batch.model_shift - batch.departure
            torch._foreach_add_(batch.params, batch.as_parameters(moves))

    def _is_its_inner(self, batch: RoundBatch) -> bool:
        """Whether W of a worker alone is its x_j, which W - (W - x_j) is but for rounding."""
        lossless = batch.w2s.lossless and batch.s2w.lossless
        average = self.outer_lr == 1 and not self.outer_momentum
        return self.exchange.ranks == 1 and lossless and average

    @contextmanager
    def agreed(self):
        """Within it the parameters are W; after it x_j again. On all ranks of a worker together.

        Within it `step`, `finish`, states, copies and checks are refused: they are of x_j.
        """
        self.require_own_parameters("agreed()")
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._swapped:
            self._take_over()
            take_over(self.inner)
        self._swapped = not self._swapped
        if self.lanes:
            self.lanes.gather_parameters()
        for batch in self.batches:
            shifts = batch.as_parameters(batch.model_shift)  # views
            for parameter, shift in zip(batch.params, shifts, strict=True):
                local_model = parameter.clone()
                parameter.copy_(shift)
                shift.copy_(local_model)
        self.buffers.swap()
        if self.lanes:
            self.lanes.share_parameters()
        take_over(self.inner, changed=False)

    def check_finite(self) -> None:
        """Raise FloatingPointError if a gradient or a parameter of this worker is not finite.

        Names the layer and the step. Waits for the device.
        """
        self.require_own_parameters("check_finite()")
        for optimizer in self.inner:
            if isinstance(optimizer, CommunicatingOptimizer):
                optimizer.check_finite()
        for batch in self.batches:
            norms = torch.stack(torch._foreach_norm(batch.params, float("inf")))
            mark(batch.broken_at, ~norms.isfinite(), self.steps or 1)
        super().check_finite()

    def _arrived(self) -> list[RoundBatch]:
        under_way = self.timetable.under_way(self.steps)
        return [batch for b, batch in enumerate(self.batches) if b not in under_way]

    def go_on_after(self, steps: int) -> None:
        super().go_on_after(steps)
        for receive in [*self._sent.values(), *self._returned.values()]:
            receive()  # or what is sent next would be taken for it
        self._sent, self._returned = {}, {}

    def _settings(self) -> dict:
        return super()._settings() | {"every": str(self.rounds)}

    def _named(self) -> list[tuple[str, Tensor]]:
        return [pair for b in self.batches for pair in zip(b.names, b.model_shift, strict=True)]
