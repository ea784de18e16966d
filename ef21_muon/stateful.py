"""What an optimizer remembers: saved, loaded and copied."""

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.identity import differences, require_layout, without_free
from ef21_muon.timing import PhaseTimer

HOOKS = tuple(
    f"_optimizer_{when}_hooks"
    for when in (
        *("step_pre", "step_post", "state_dict_pre", "state_dict_post"),
        *("load_state_dict_pre", "load_state_dict_post"),
    )
)
# What every state has, beside what it is of.
PARTS = ("state", "param_groups", "round", "steps", "traffic", "generators")


class StatefulOptimizer(torch.optim.Optimizer):
    """An optimizer whose state says what it is of, and whose copies send as it does.

    `inner` are the optimizers that it is around, whose states are part of its own. A subclass has
    the attributes of CommunicatingOptimizer.
    """

    # What a scheduler wraps, events of a device, and a thread; and hooks, as torch has it.
    NOT_COPIED = ("step", "timer", "roll_call", *HOOKS)
    RULE: tuple[str, ...] = ()  # the entries of a parameter group that are objects, not numbers
    inner: Sequence[torch.optim.Optimizer] = ()
    _swapped = False  # whether parameters and W have changed places

    def state_dict(self) -> dict:
        """A copy of this rank's state, with that of inner optimizers: later steps do not change it.

        Ranks differ in what they remember, and in what they serve: `full_state_dict` has the state
        of all. What is an object in a group, as norms and compressors, is named in `of` alone;
        build the optimizer with the same ones to load it. Takes as much memory as the state.
        Raises RuntimeError where the parameters are W, as within `agreed()`.
        """
        self.require_own_parameters("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        generators = {purpose: one.get_state() for purpose, one in self.generators.items()}
        state = {
            **self._packed(),
            "of": self._identity(),
            "round": self.round,
            "steps": self.steps,
            "traffic": self.traffic.state(),
            "generators": generators,
        }
        if shared := self.buffers.state():
            state["buffers"] = shared
        if self.inner:
            state["inner"] = [copy.deepcopy(one.state_dict()) for one in self.inner]
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def _packed(self) -> dict:
        """Copies of tensors, and what groups have beside objects, as torch's optimizers name it."""
        numbers = {p: n for n, p in enumerate(p for g in self.param_groups for p in g["params"])}
        state = {
            numbers[parameter]: {key: tensor.clone() for key, tensor in own.items()}
            for parameter, own in self.state.items()
        }
        groups = [
            {key: value for key, value in group.items() if key not in self.RULE}
            | {"params": [numbers[parameter] for parameter in group["params"]]}
            for group in self.param_groups
        ]
        return {"state": state, "param_groups": copy.deepcopy(groups)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue exactly from a `state_dict` of the same rank, parameters and options.

        Or from this rank's part of a `full_state_dict`. The model's own state has to be loaded
        beside it. The state is copied, so it can be loaded again. Options of groups are then those
        of the state, as with torch's optimizers; the learning rate, `missing` and `buckets` may
        differ from those here. Raises ValueError when it does not fit, before anything changes,
        and RuntimeError where the parameters are W, as within `agreed()`.
        """
        self.require_own_parameters("load_state_dict()")
        if state_dict is None:
            raise ValueError(
                "the state is None, as full_state_dict() gives it on all ranks but 0: save it "
                "there, and load the file on every rank"
            )
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                f"the state is of type {type(state_dict).__name__}: load what state_dict() gave"
            )
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        try:
            state_dict = self._part_of(state_dict)
            pairs, traffic = self._fitting(state_dict), Traffic.from_state(state_dict["traffic"])
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"the state is damaged ({error!r}): load what {type(self).__name__}.state_dict() "
                "or full_state_dict() gave"
            ) from error
        self.buffers.load(state_dict.get("buffers", {}))
        for inner, saved in zip(self.inner, state_dict.get("inner", ()), strict=True):
            inner.load_state_dict(copy.deepcopy(saved))
        if self.inner:
            self.param_groups = [group for one in self.inner for group in one.param_groups]
        for state, saved in pairs:
            for key, tensor in saved.items():
                state[key].copy_(tensor)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(copy.deepcopy({k: v for k, v in saved.items() if k != "params"}))
        self.traffic = traffic
        self.go_on_after(state_dict["steps"])
        for purpose, generator in self.generators.items():
            generator.set_state(state_dict["generators"][purpose].cpu())
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

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

    def require_own_parameters(self, call: str) -> None:
        """Raise RuntimeError where a call would take W for the parameters of this worker."""
        if self._swapped:
            raise RuntimeError(
                f"{call} within agreed(): the parameters are W there, leave it first"
            )

    def _identity(self) -> dict:
        """What a state is of: the place of this rank, the method, and all options when built."""
        rank, ranks = place_in(self._everyone)
        own = {"method": type(self).__name__, "rank": rank, "ranks": ranks}
        return own | without_free(self._built_as)

    def _part_of(self, state_dict: dict) -> dict:
        """This rank's state. Raises ValueError for one that is of something else."""
        mine = self._identity()
        states = state_dict.get("ranks", [state_dict])
        state_dict = states[min(mine["rank"], len(states) - 1)]
        of = state_dict.get("of", mine)
        if differing := differences(mine, of, "{key} {theirs!r} (here {mine!r})"):
            if mine["ranks"] != of.get("ranks"):
                advice = "start as many ranks as it was saved on"
            elif mine["rank"] != of.get("rank"):
                advice = (
                    "load it where it was saved, on every rank its own, or save full_state_dict() "
                    "and load that on all"
                )
            else:
                advice = (
                    "build the optimizer as that one was, load, and then change in param_groups "
                    "what is to change"
                )
            raise ValueError(f"the state is of {differing}: {advice}")
        needed = {"of", *PARTS, "inner"} if self.inner else {"of", *PARTS}
        if not state_dict.keys() >= needed:
            raise ValueError(
                "the state lacks what it is of, its counters and its random numbers: load what "
                f"{mine['method']}.state_dict() or full_state_dict() gave, not a part of it"
            )
        return state_dict

    def go_on_after(self, steps: int) -> None:
        """Count on from as many steps, with a state that was loaded or copied."""
        self.steps, self.timer, self.begun = steps, PhaseTimer(), steps > 0

    def __deepcopy__(self, memo: dict) -> "StatefulOptimizer":
        """Of these parameters, or of their copies where they are copied with it; sends as this."""
        held = [*vars(self).values(), *(vars(self.lanes).values() if self.lanes else ())]
        memo |= {id(group): group for group in held if isinstance(group, dist.ProcessGroup)}
        other = memo[id(self)] = object.__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other

    def __getstate__(self) -> dict:
        self.require_own_parameters("a copy")
        return {name: value for name, value in vars(self).items() if name not in self.NOT_COPIED}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.go_on_after(self.steps)

    def _fitting(self, state_dict: dict) -> list[tuple[dict, dict]]:
        """Of every parameter the state and the saved one. Raises ValueError if they do not fit.

        And for counters and random numbers that could not be loaded.
        """
        if not (type(state_dict["steps"]) is int and state_dict["steps"] >= 0):
            raise ValueError(
                f"the state is after {state_dict['steps']!r} steps: give a whole number, at least 0"
            )
        for purpose, generator in self.generators.items():
            saved, here = state_dict["generators"][purpose], generator.get_state()
            if saved.shape != here.shape:
                raise ValueError(
                    f"the state holds {len(saved)} bytes of random numbers where this device has "
                    f"{len(here)}: load it on the kind of device that it was saved on"
                )
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
        self.buffers.require_fit(state_dict.get("buffers", {}))
        if len(saved_inner := state_dict.get("inner", ())) != len(self.inner):
            raise ValueError(
                f"the state holds {len(saved_inner)} inner optimizers, this one has "
                f"{len(self.inner)}: load what state_dict() gave"
            )
        for inner, saved in zip(self.inner, saved_inner, strict=True):
            if isinstance(inner, StatefulOptimizer):
                inner._fitting(inner._part_of(saved))
            else:
                require_layout(inner, saved)
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
