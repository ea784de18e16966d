"""What optimizers that send by themselves have in common: a step is a round of messages."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from ef21_muon.checks import require_equal_parameters, require_gradients
from ef21_muon.exchange.collectives import Traffic, place_in
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
        self.process_group = process_group
        self.timer, self.steps, self.traffic = PhaseTimer(), 0, Traffic()
        rank, _ = place_in(process_group)
        self.generators = {
            purpose: self._new_generator(seed, rank, purpose) for purpose in purposes
        }

    def _begin(self, batches: Sequence[Batch]) -> None:
        """The layers that rounds are of, which all ranks hold alike."""
        self.batches = batches
        for batch in batches:
            self.state.update(batch.parameter_state())
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
        self.traffic += self._round()
        self.steps += 1
        return loss

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
        """Raise ValueError if workers hold different parameters; to be called on all ranks.

        Names rank and layer. Waits for the device.
        """
        require_equal_parameters(self._named(), self.process_group)

    def state_dict(self) -> dict:
        """This rank's state alone: ranks differ in what they remember, and in what they serve.

        What is an object in a group, as norms and compressors, is not in it; build the optimizer
        with the same ones to load it.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            for entry in self.RULE:
                group.pop(entry, None)
        generators = {purpose: one.get_state() for purpose, one in self.generators.items()}
        return {
            **state,
            "round": self.round,
            "steps": self.steps,
            "traffic": self.traffic.state(),
            "generators": generators,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue exactly from a `state_dict` of the same rank, parameters and options.

        Raises ValueError when it does not fit.
        """
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

    def go_on_after(self, steps: int) -> None:
        """Count on from as many steps."""
        self.steps = steps

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
        device = self.param_groups[0]["params"][0].device
        digest = hashlib.sha256(f"{seed}/{rank}/{purpose}".encode()).digest()
        return Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))

    def _named(self) -> list[tuple[str, Tensor]]:
        return [pair for b in self.batches for pair in zip(b.names, b.params, strict=True)]
