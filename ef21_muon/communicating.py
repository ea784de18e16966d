"""What optimizers that send by themselves have in common: a step is a round of messages."""

import copy
import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from ef21_muon.checks import (
    require_equal_groups,
    require_equal_parameters,
    require_gradients,
    require_local_gradients,
    require_ranks,
    require_same_group,
)
from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.exchange.lanes import Lanes
from ef21_muon.exchange.layers import Batch
from ef21_muon.timing import PhaseTimer


class CommunicatingOptimizer(torch.optim.Optimizer):
    """One `step()` after `loss.backward()` on every worker is one round of messages.

    Gradients are local: do not wrap the model in DistributedDataParallel. With an initialised
    process group every rank is a worker; without one there is a single worker, and nothing is sent.

    A subclass forms `batches` of layers, gives them to `_begin`, and says in `_round` what a round
    is. What is random in messages is drawn from `generators`, one for each of `purposes`, seeded by
    `seed`, the rank and the purpose.

    Raises ValueError for parameters that differ between ranks, RuntimeError from `step` for a
    parameter whose gradient is missing or does not fit. Gradients that are not finite are noticed
    by `check_finite`.
    """

    # torch.amp.GradScaler leaves it to `step` to skip, by `found_inf` and `grad_scale`.
    _step_supports_amp_scaling = True
    NOT_COPIED = ("step", "timer")  # what a scheduler wraps, and events of a device
    lanes: Lanes | None = None  # of a worker of several ranks
    RULE: tuple[str, ...] = ()  # the entries of a parameter group that are objects, not numbers

    def __init__(
        self,
        params,
        defaults: dict,
        *,
        seed: int,
        purposes: Sequence[str],
        process_group: dist.ProcessGroup | None,
    ):
        super().__init__(params, defaults)
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("the parameter groups hold no parameter: give those of the model")
        self.process_group = process_group
        self.timer, self.steps, self.traffic = PhaseTimer(), 0, Traffic()
        rank, self.ranks = place_in(process_group)
        self.generators = {
            purpose: self._new_generator(seed, rank, purpose) for purpose in purposes
        }

    def _begin(self, batches: Sequence[Batch]) -> None:
        """The layers that rounds are of, which all ranks hold alike."""
        self.batches = batches
        for batch in batches:
            self.state.update(batch.parameter_state())
        self._formed = self._as_given()
        require_equal_parameters(self._named(), self.process_group)

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
        require_gradients(self.batches, type(self).__name__)
        self._require_as_built()
        if self._overflowed(self._everyone):
            return loss
        with self._own_precision():
            self.traffic += self._round()
        self.steps += 1
        return loss

    def _as_given(self) -> list[tuple[list[Tensor], dict]]:
        """What batches are made of: of every group its parameters and compressors."""
        fixed = {"w2s", "s2w"}.intersection(self.RULE)
        return [
            (list(group["params"]), {entry: group[entry] for entry in fixed & group.keys()})
            for group in self.param_groups
        ]

    def _require_as_built(self) -> None:
        """Raise RuntimeError where groups or processes are others than when this was built."""
        require_ranks(self.ranks, self.process_group)
        for index, (now, formed) in enumerate(zip(self._as_given(), self._formed, strict=True)):
            require_same_group(index, now, formed)
        if self.steps == 0 and self.ranks > 1:
            require_local_gradients(self.param_groups)

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
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            held = [p for group in self.param_groups for p in group["params"]]
            held = [p for p, _ in self.lanes.holders] if self.lanes else held
            torch._foreach_mul_([p.grad for p in held if p.grad is not None], 1 / scale)
        if place_in(group)[1] > 1:
            found_inf = found_inf.clone()
            dist.all_reduce(found_inf, group=group)
        return bool(found_inf)

    def _own_precision(self):
        """Where a step is taken within autocast, its products are not of that precision."""
        device = self.batches[0].broken_at.device
        return torch.autocast(device.type, enabled=False)

    def _gradients(self, batch: Batch) -> list[Tensor]:
        """Of this worker, float32 (m, n) each."""
        gradients = batch.matrices(parameter.grad.float() for parameter in batch.params)
        finite = torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite()
        batch.broken_at.masked_fill_(~finite & (batch.broken_at == 0), self.steps + 1)
        return gradients

    def check_finite(self) -> None:
        """Raise FloatingPointError if a gradient of this worker was NaN or infinite so far.

        Names the layer and the step. Waits for the device, so call it where the loss is read.
        """
        broken = [
            (int(step), name)
            for batch in self.batches
            for step, name in zip(batch.broken_at.tolist(), batch.names, strict=True)
            if step
        ]
        if broken:
            step, name = min(broken)
            raise FloatingPointError(
                f"the gradient of {name} was not finite at step {step}: lower the learning rate "
                "or look at that step's data"
            )

    def check_agreement(self) -> None:
        """Raise ValueError if workers hold different parameters or numbers of parameter groups.

        To be called on all ranks; names rank, and layer or group. Waits for the device.
        """
        require_equal_groups(self.param_groups, self.process_group)
        require_equal_parameters(self._named(), self.process_group)

    def state_dict(self) -> dict:
        """This rank's state alone: ranks differ in what they remember, and in what they serve.

        `full_state_dict` has that of all. What is an object in a group, as norms and compressors,
        is not in it; build the optimizer with the same ones to load it.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            for entry in self.RULE:
                group.pop(entry, None)
        generators = {purpose: one.get_state() for purpose, one in self.generators.items()}
        return {
            **state,
            "of": self._identity(),
            "round": self.round,
            "steps": self.steps,
            "traffic": self.traffic.state(),
            "generators": generators,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue exactly from a `state_dict` of the same rank, parameters and options.

        Or from this rank's part of a `full_state_dict`. Raises ValueError when it does not fit,
        before anything changes.
        """
        state_dict = self._part_of(state_dict)
        pairs = self._fitting(state_dict)
        for state, saved in pairs:
            for key, tensor in saved.items():
                state[key].copy_(tensor)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.traffic = Traffic.from_state(state_dict["traffic"])
        self.go_on_after(state_dict["steps"])
        for purpose, generator in self.generators.items():
            generator.set_state(state_dict["generators"][purpose].cpu())

    def full_state_dict(self) -> dict | None:
        """The state of all ranks for one file, on rank 0, and None on the others.

        To be called on all ranks; `load_state_dict` takes it on all of them.
        """
        mine = self.state_dict()
        rank, ranks = place_in(self._everyone)
        if ranks == 1:
            return {"ranks": [mine]}
        states = [None] * ranks if rank == 0 else None
        dist.gather_object(mine, states, group=self._everyone, group_dst=0)
        return {"ranks": states} if rank == 0 else None

    def _identity(self) -> dict:
        """What a state is of, as far as shapes do not tell it."""
        rank, ranks = place_in(self._everyone)
        return {"method": type(self).__name__, "rank": rank, "ranks": ranks}

    def _part_of(self, state_dict: dict) -> dict:
        """This rank's state. Raises ValueError for one that is of something else."""
        mine = self._identity()
        states = state_dict.get("ranks", [state_dict])
        state_dict = states[min(mine["rank"], len(states) - 1)]
        of = state_dict.get("of")
        if of is None:
            raise ValueError(
                "the state lacks what it is of, its counters and its random numbers: load what "
                f"{mine['method']}.state_dict() or full_state_dict() gave, not a part of it"
            )
        differing = [
            f"{key} {of.get(key)!r} (here {mine[key]!r})"
            for key in mine
            if of.get(key) != mine[key]
        ]
        if differing:
            raise ValueError(
                f"the state is of {', '.join(differing)}: load it where it was saved, on every "
                "rank its own, or save full_state_dict() and load that on all"
            )
        return state_dict

    def go_on_after(self, steps: int) -> None:
        """Count on from as many steps, with a state that was loaded or copied."""
        self.steps, self.timer = steps, PhaseTimer()

    def __deepcopy__(self, memo: dict) -> "CommunicatingOptimizer":
        """Of these parameters, or of their copies where they are copied with it; sends as this."""
        held = [*vars(self).values(), *(vars(self.lanes).values() if self.lanes else ())]
        memo |= {id(group): group for group in held if isinstance(group, dist.ProcessGroup)}
        other = memo[id(self)] = object.__new__(type(self))
        vars(other).update(copy.deepcopy(self.__getstate__(), memo))
        other.go_on_after(other.steps)
        return other

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in self.NOT_COPIED}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.go_on_after(self.steps)

    def _fitting(self, state_dict: dict) -> list[tuple[dict, dict]]:
        """Of every parameter the state and the saved one. Raises ValueError if they do not fit."""
        saved_groups = state_dict["param_groups"]
        layout, saved_layout = (
            [(len(group["params"]), group.get("param_names")) for group in groups]
            for groups in (self.param_groups, saved_groups)
        )
        if layout != saved_layout:
            raise ValueError(
                f"the state holds parameter groups {saved_layout}, this optimizer {layout}: "
                "build it from the same groups"
            )
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in saved_groups for index in group["params"]]
        pairs = [
            (self.state[parameter], state_dict["state"][index])
            for parameter, index in zip(parameters, indices, strict=True)
        ]
        for state, saved in pairs:
            shapes, saved_shapes = (
                {key: tuple(tensor.shape) for key, tensor in sorted(one.items())}
                for one in (state, saved)
            )
            if shapes != saved_shapes:
                raise ValueError(
                    f"the state holds {saved_shapes} where this optimizer needs {shapes}: build it "
                    "from the same groups and options, and load on the same rank"
                )
        return pairs

    def _new_generator(self, seed: int, rank: int, purpose: str) -> Generator:
        device = next(p.device for group in self.param_groups for p in group["params"])
        digest = hashlib.sha256(f"{seed}/{rank}/{purpose}".encode()).digest()
        return Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))

    def _named(self) -> list[tuple[str, Tensor]]:
        return [pair for b in self.batches for pair in zip(b.names, b.params, strict=True)]
