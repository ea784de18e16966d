"""What an optimizer remembers: saved, loaded and copied."""

import copy

import torch
import torch.distributed as dist

from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.timing import PhaseTimer


class StatefulOptimizer(torch.optim.Optimizer):
    """An optimizer whose state says what it is of, and whose copies send as it does.

    A subclass has the attributes of CommunicatingOptimizer.
    """

    # What a scheduler wraps, events of a device, and a thread.
    NOT_COPIED = ("step", "timer", "roll_call")
    RULE: tuple[str, ...] = ()  # the entries of a parameter group that are objects, not numbers

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
            group.update(copy.deepcopy({k: v for k, v in saved.items() if k != "params"}))
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

    def __deepcopy__(self, memo: dict) -> "StatefulOptimizer":
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
