"""What optimizers that send by themselves have in common: a step is a round of messages."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from math import prod

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from ef21_muon.checks import (
    PARTED,
    UNEQUAL,
    choice,
    require_equal_groups,
    require_equal_parameters,
    require_equal_settings,
    require_local_gradients,
    require_ranks,
    require_same_groups,
    require_same_state,
)
from ef21_muon.exchange.buffers import Buffers, warn_of_statistics
from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.exchange.gradients import Layer, bring_gradients
from ef21_muon.exchange.lanes import Lanes
from ef21_muon.exchange.layers import Batch, mark
from ef21_muon.exchange.notice import Notice
from ef21_muon.exchange.roll_call import RollCall
from ef21_muon.exchange.shards import require_whole
from ef21_muon.identity import described, options_of, shapes_of
from ef21_muon.stateful import StatefulOptimizer
from ef21_muon.timing import PhaseTimer

# Parameters of constructors that are no options of the method.
NO_OPTIONS = {"params", "defaults", "inner", "fleet", "lanes", "process_group", "buffers", "self"}

log = logging.getLogger("ef21_muon")


class CommunicatingOptimizer(StatefulOptimizer):
    """One `step()` after `loss.backward()` on every worker is one round of messages.

    Gradients are local: do not wrap the model in DistributedDataParallel. With an initialised
    process group every rank is a worker; without one there is a single worker, and nothing is sent.

    A subclass forms `batches` of layers, gives them to `_begin`, and says in `_round` what a round
    is. What is random in messages is drawn from `generators`, one for each of `purposes`, seeded by
    `seed`, the rank and the purpose. A parameter without a gradient is refused, or with `missing`
    "zero" has that on this worker, in steps that have others. Of the module `buffers` workers share
    the mean of floating-point buffers too.

    Raises ValueError for parameters and settings that differ between ranks, RuntimeError from
    `step` for a parameter whose gradient is missing or does not fit. Gradients that are not finite
    are noticed by `check_finite`, and by `check_agreement` on all ranks. A rank that waits for
    others in a step says for whom.
    """

    # torch.amp.GradScaler leaves it to `step` to skip, by `found_inf` and `grad_scale`.
    _step_supports_amp_scaling = True
    lanes: Lanes | None = None  # of a worker of several ranks
    roll_call: RollCall | None = None  # from the first step on, where others step too
    BROKEN = "the gradient of {} was not finite at step {}"
    NOT_COPIED = (*StatefulOptimizer.NOT_COPIED, "notice")

    def __init__(
        self,
        params,
        defaults: dict,
        *,
        seed: int,
        purposes: Sequence[str],
        process_group: dist.ProcessGroup | None,
        missing: str = "refuse",
        buffers: nn.Module | None = None,
    ):
        super().__init__(params, defaults)
        self.missing = choice("missing", missing, ("refuse", "zero"))
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("the parameter groups hold no parameter: give those of the model")
        require_whole([p for g in self.param_groups for p in g["params"]], type(self).__name__)
        self.process_group = process_group
        self.buffers = Buffers(buffers, self._everyone)
        self.timer, self.notice = PhaseTimer(), Notice()
        self.steps, self.traffic = 0, Traffic()
        self.begun = False  # whether there was a step since the state was new
        rank, self.ranks = place_in(process_group)
        self.generators = {
            purpose: self._new_generator(seed, rank, purpose) for purpose in purposes
        }

    def _begin(self, batches: Sequence[Batch]) -> None:
        """The layers that rounds are of, which all ranks hold alike."""
        self.batches = batches
        for batch in batches:
            self.state.update(batch.parameter_state())
        self._views = [(p, key, one) for p, own in self.state.items() for key, one in own.items()]
        self._formed = self._as_given()
        self._built_as = self._settings()
        device = batches[0].broken_at.device
        require_equal_settings(self._built_as, device, self.process_group)
        require_equal_parameters(self._shared_by_all(), self.process_group, UNEQUAL)

    def _round(self) -> Traffic:
        """Take a round, from gradients to parameters; returns what it took."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict) -> None:
        """Used by the constructor; later groups are refused, since batches are already formed."""
        if hasattr(self, "batches"):
            raise RuntimeError(
                f"{type(self).__name__} forms its batches once: pass all groups when it is built"
            )
        super().add_param_group(param_group)

    @property
    def round(self) -> int:
        """Rounds so far."""
        return self.steps

    @property
    def w2s_bytes(self) -> int:
        """Bytes that this worker has sent to the servers, or to collectives, so far."""
        return self.traffic.w2s_bytes

    @property
    def s2w_bytes(self) -> int:
        """Bytes that this worker has received from the servers, or from collectives, so far."""
        return self.traffic.s2w_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes that this worker has received so far: `s2w_bytes`, or the messages of the others.

        The latter where every worker serves.
        """
        return self.traffic.received_bytes

    @property
    def wire_tx_bytes(self) -> int:
        """Bytes that this rank has handed to the network so far: a message to itself is not."""
        return int(self.traffic.wire_tx_bytes)

    @torch.no_grad()
    def step(self, closure=None):
        """One round, on all workers together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._in_step():
            self._require_as_built()
            bring_gradients(self._brought, type(self).__name__)
            self._look_back()
            if self._overflowed(self._everyone):
                return loss
            with self._own_precision():
                self.traffic += self._round()
            self.steps += 1
            self.begun = True
        return loss

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Where others may wait for this rank, and this for others."""
        if place_in(self._everyone)[1] == 1:
            yield
            return
        self.roll_call = self.roll_call or RollCall(self._everyone)
        step = self.steps
        self.roll_call.enter(step)
        try:
            yield
        except Exception as error:
            self.roll_call.refuse(step, str(error))
            raise
        finally:
            self.roll_call.leave()

    def _as_given(self) -> list[tuple[list[Tensor], dict]]:
        """What batches are made of: of every group its parameters and compressors."""
        fixed = {"w2s", "s2w"}.intersection(self.RULE)
        return [
            (list(group["params"]), {entry: group[entry] for entry in fixed & group.keys()})
            for group in self.param_groups
        ]

    def _require_as_built(self) -> None:
        """Raise RuntimeError where groups, state or processes are others than when built."""
        if self.inner:  # whose load_state_dict makes other groups, of the same parameters
            self.param_groups = [group for one in self.inner for group in one.param_groups]
        require_ranks(self.ranks, self.process_group)
        require_same_state(self.state, self._views)
        require_same_groups(self._as_given(), self._formed)
        if self.steps == 0 and self.ranks > 1:
            require_local_gradients(self.param_groups)
        if self.steps == 0 and place_in(self._everyone)[1] > 1:
            warn_of_statistics(self._brought, self.buffers.module)

    @property
    def _brought(self) -> list[Layer]:
        """Whose gradients this worker brings to a step, of all its lanes."""
        return self.lanes.layers if self.lanes else self._layers

    @cached_property
    def _layers(self) -> list[Layer]:
        """The parameters of batches, which are formed once."""
        return [
            Layer(name, parameter, prod(batch.shape), self.missing)
            for batch in self.batches
            for name, parameter in zip(batch.names, batch.params, strict=True)
        ]

    @property
    def _held(self) -> list[Tensor]:
        """The parameters whose gradients this worker brings, of all its lanes."""
        if self.lanes:
            return [parameter for parameter, _ in self.lanes.holders]
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def _sharded(self) -> bool:
        """Whether gradients are of shards, which lanes look at where they gather them."""
        return self.lanes is not None and self.lanes.shards is not None

    @property
    def _everyone(self) -> dist.ProcessGroup | str | None:
        """The ranks of all workers, which are more than those of a lane."""
        return None if self.lanes else self.process_group

    def _overflowed(self, group: dist.ProcessGroup | None) -> bool:
        """Undo a GradScaler's scale; whether a scaled gradient of any rank of the group overflowed.

        Then no rank may step, or rounds would slip against each other. Waits for the device.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return False
        if self._sharded:
            raise RuntimeError(
                "GradScaler does not see the gradients of a sharded model: train in bfloat16, "
                "which needs no scaling"
            )
        gradients = [p.grad for p in self._held if p.grad is not None]
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            torch._foreach_mul_(gradients, 1 / scale)
        if self.lanes:  # of which the scaler has seen this rank's alone
            norms = torch.stack(torch._foreach_norm(gradients, float("inf")))
            found_inf = (~norms.isfinite()).any().float()
        if place_in(group)[1] > 1:
            found_inf = found_inf.clone()
            dist.all_reduce(found_inf, group=group)
        if self.lanes and found_inf:  # as a step lets go of them
            for parameter in self._held:
                parameter.grad = None
        return bool(found_inf)

    def _own_precision(self):
        """Where a step is taken within autocast, its products are not of that precision."""
        device = self.batches[0].broken_at.device
        return torch.autocast(device.type, enabled=False)

    def _gradients(self, batch: Batch) -> list[Tensor]:
        """Of this worker, float32 (m, n) each."""
        gradients = batch.matrices(parameter.grad.float() for parameter in batch.params)
        finite = torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite()
        mark(batch.broken_at, ~finite, self.steps + 1)
        return gradients

    def check_finite(self) -> None:
        """Raise FloatingPointError if a gradient or a message of this worker was NaN or infinite.

        Names the layer and the step, the first of all steps so far. Waits for the device, so call
        it where the loss is read.
        """
        broken = [
            (step, kind, name)
            for batch in self.batches
            for kind, at in enumerate((batch.broken_at, batch.unsent_at))
            for step, name in zip(at.tolist(), batch.names, strict=True)
            if step
        ]
        if broken:
            step, kind, name = min(broken)
            what = (self.BROKEN, "what this worker sends of {} was not finite at step {}")[kind]
            raise FloatingPointError(
                f"{what.format(name, step)}: lower the learning rate or look at that step's data"
            )

    def _look_back(self) -> None:
        """Say once what was not finite in the steps before, without waiting for the device."""
        if not self.notice.look([at for b in self.batches for at in (b.broken_at, b.unsent_at)]):
            return
        try:
            self.check_finite()
        except FloatingPointError as error:
            rank, _ = place_in(self._everyone)
            log.warning("rank %d: %s (check_finite() raises this: end the run)", rank, error)

    def _require_finite(self) -> None:
        """Raise on all ranks what `check_finite` raises on one, which it names."""
        problem = None
        try:
            self.check_finite()
        except FloatingPointError as error:
            problem = str(error)
        _, ranks = place_in(self._everyone)
        failed = torch.tensor(int(problem is not None), device=self.batches[0].broken_at.device)
        if ranks > 1:
            dist.all_reduce(failed, group=self._everyone)
        if not failed:
            return
        problems = [problem] * ranks
        if ranks > 1:
            dist.all_gather_object(problems, problem, group=self._everyone)
        rank = next(rank for rank, its in enumerate(problems) if its is not None)
        raise FloatingPointError(f"rank {rank}: {problems[rank]}" if ranks > 1 else problem)

    def check_agreement(self) -> None:
        """Raise ValueError if workers hold different parameters, buffers or numbers of groups.

        And FloatingPointError for what was not finite on any (`check_finite`). To be called on all
        ranks; names rank, and layer or group. Waits for the device.
        """
        self._require_finite()
        if self.lanes:
            self.lanes.gather_parameters()
        require_equal_groups(self.param_groups, self.process_group)
        require_equal_parameters(self._shared_by_all(), self.process_group, self._why_parted())

    def _why_parted(self) -> str:
        """Why parameters may differ that were equal when this was built, and what to do."""
        return PARTED.format("")

    def go_on_after(self, steps: int) -> None:
        super().go_on_after(steps)
        self.notice = Notice()
        for batch in self.batches:  # what was not finite was before
            batch.broken_at.zero_()
            batch.unsent_at.zero_()

    def _settings(self) -> dict:
        """All options as plain values, which all ranks have to be given alike."""
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, CommunicatingOptimizer)]
        named = {name for kind in kinds for name in signature(kind.__init__).parameters}
        own = {name: described(vars(self)[name]) for name in sorted(named & vars(self).keys())}
        method = {"method": type(self).__name__, "ranks": place_in(self._everyone)[1]}
        entries = () if self.inner else ("name", *self.defaults)  # theirs are their own
        of_groups = options_of(self.param_groups, entries)
        own = {name: value for name, value in own.items() if name not in NO_OPTIONS}
        own["buffers"] = str(self.buffers)
        return method | own | of_groups | shapes_of(self.param_groups)

    def _new_generator(self, seed: int, rank: int, purpose: str) -> Generator:
        device = next(p.device for group in self.param_groups for p in group["params"])
        digest = hashlib.sha256(f"{seed}/{rank}/{purpose}".encode()).digest()
        return Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))

    def _named(self) -> list[tuple[str, Tensor]]:
        return [pair for b in self.batches for pair in zip(b.names, b.params, strict=True)]

    def _shared_by_all(self) -> list[tuple[str, Tensor]]:
        return [*self._named(), *self.buffers.shared.items()]
