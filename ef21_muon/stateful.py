"""The state methods of optimizers that send messages, as torch's optimizers have them."""

from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from ef21_muon import state
from ef21_muon.guards import UnsentSteps
from ef21_muon.transport.fixed import Group, place_in

if TYPE_CHECKING:
    from ef21_muon.communicating import Communicating


class Stateful(torch.optim.Optimizer):
    """An optimizer whose ranks remember different things, each its own.

    Attributes:
        everyone: the process group of all ranks that step together.
        unsent: counts local steps that were never sent.
    """

    everyone: Group
    unsent: UnsentSteps | None = None

    @property
    def _swapped(self) -> bool:
        """Whether parameters and W have changed places."""
        return False

    def require_own_parameters(self, call: str) -> None:
        """Refuse a call that would take W for this worker's own parameters.

        Args:
            call: what was called, for the error.

        Raises:
            RuntimeError: within `global_params()`.
        """
        if self._swapped:
            raise RuntimeError(
                f"{call} within global_params(): the parameters are W there, leave it first"
            )

    def state_dict(self) -> dict:
        """Return a copy of what this rank remembers, that later steps do not change.

        Ranks remember different things: momentum, error feedback and random numbers of their
        worker, and, on owner ranks, the servers' tables. So every rank saves its own state, or all
        call `full_state_dict`, or all save into one folder by torch.distributed.checkpoint, whose
        `get_optimizer_state_dict` and `set_optimizer_state_dict` work with and without
        `fully_shard`. Its options `cpu_offload` and `flatten_optimizer_state_dict` work too.

        Returns:
            "param_groups": groups as torch's optimizers save them. Objects in them, as norms and
            compressors, are saved as text: build the optimizer with the same ones before loading.
            "state": by parameter and table, {"rank0": tensor} with the number of this process in
            the name, so that the folder keeps those of all ranks. Beside the first tensor,
            "rank0_rest" holds what the state is of, steps and bytes, random numbers, buffers, and
            the state of inner optimizers. The tensors are as large as the optimizer's own ones.

        Raises:
            RuntimeError: within `global_params()`, where the parameters are W.
            ValueError: where torch asks with full_state_dict=True on several ranks, since it would
                keep the state of rank 0 alone; and, with flatten_optimizer_state_dict=True, on a
                rank that remembers nothing of its layers.

        Example:
            Write a checkpoint on all ranks, and continue from it in a new process. With local steps
            workers differ in their parameters between rounds, so name the model after the worker,
            as f"model{rank}".

            import torch.distributed.checkpoint as dcp
            from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

            model_state, optim_state = get_state_dict(model, optimizer)
            dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id="step-100")

            model_state, optim_state = get_state_dict(model, optimizer)  # of the new ones
            dcp.load({"model": model_state, "optim": optim_state}, checkpoint_id="step-100")
            set_state_dict(
                model, optimizer, model_state_dict=model_state, optim_state_dict=optim_state
            )
        """
        saved = state.save(cast("Communicating", self))
        if self.unsent:
            self.unsent.steps = 0
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue exactly from a state of the same rank, parameters and options.

        The model's own state has to be loaded beside it. The state is copied, so it can be loaded
        again. Options of groups become those of the state, as with torch's optimizers. The state
        may have another lr, `missing_grad`, `buckets` and `seed` than this optimizer.

        Args:
            state_dict: what `state_dict` of this rank or `full_state_dict` returned, or what
                torch's `set_optimizer_state_dict` hands on.

        Raises:
            ValueError: if the state is damaged, of another rank, number of ranks, method or
                options, or does not fit; nothing has changed then.
            RuntimeError: within `global_params()`, where the parameters are W.

        Example:
            saved = torch.load(f"rank{rank}.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        """
        state.load(cast("Communicating", self), state_dict)

    def full_state_dict(self) -> dict | None:
        """Return what all ranks remember, on rank 0. To be called on all ranks together.

        Returns:
            {"ranks": [the `state_dict` of every rank]} on rank 0, for one file, and None on all
            others. `load_state_dict` takes it on every rank.

        Raises:
            RuntimeError: within `global_params()`, where the parameters are W.

        Example:
            saved = optimizer.full_state_dict()
            if dist.get_rank() == 0:
                torch.save(saved, "optimizer.pt")
            optimizer.load_state_dict(torch.load("optimizer.pt", weights_only=True))
        """
        mine = self.state_dict()
        rank, ranks = place_in(self.everyone)
        if ranks == 1 or isinstance(self.everyone, str):
            return {"ranks": [mine]}
        states = [None] * ranks if rank == 0 else None
        dist.gather_object(mine, states, group=self.everyone, group_dst=0)
        return {"ranks": states} if rank == 0 else None
