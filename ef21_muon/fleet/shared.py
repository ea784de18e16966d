"""What the workers of a fleet share, and how a worker adopts it from the others."""

import hashlib
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from ef21_muon.channel import finite
from ef21_muon.checks.arithmetic import WHY, digests, of_messages
from ef21_muon.fleet.admission import FleetRefused, differing_from
from ef21_muon.fleet.verdict import INSTEAD
from ef21_muon.inner import beginner
from ef21_muon.local_steps import LocalSteps
from ef21_muon.transport.agreement import fingerprint

TABLES = ("global_params", "server_momentum")  # of a batch's state, the same on all workers


class SharedState:
    """What all workers share: W and the outer momentum V of an optimizer, and counts of steps.

    Args:
        optimizer: whose state it is.
        run: by name, other settings that have to be the same on all workers. They take precedence
            over the optimizer's.

    Attributes:
        built: by name, the settings that have to be the same on all workers.
        bits: by name, fingerprints of what every worker computes for itself.
        synced_steps: the local steps of all workers in W.
    """

    def __init__(self, optimizer: LocalSteps, run: Mapping[str, object]):
        self.optimizer, self.device, self.synced_steps = optimizer, optimizer.device, 0
        settings = {**run, **optimizer._built_as, **run}
        self.built = {key: str(value) for key, value in settings.items()}
        messages = chain(*(of_messages(way, optimizer.rules) for way in ("s2w", "w2s")))
        self.bits = {f"bits of {name}": str(bits) for name, bits in digests(messages).items()}
        text = repr(sorted((self.built | self.bits).items())).encode()
        self._digest_of_built = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        self._reset_inner = [beginner(inner) for inner in optimizer.inner]

    def tensors(self) -> list[Tensor]:
        """W of every batch and, where there is one, V."""
        self.optimizer.require_own_parameters("what workers share")
        states = [batch.state for batch in self.optimizer.batches]
        return [state[table] for state in states for table in TABLES if table in state]

    def fingerprint(self) -> int:
        """A checksum, int64, of the state and the settings. Waits for the device."""
        total = torch.full((), self._digest_of_built, dtype=torch.int64, device=self.device)
        for tensor in self.tensors():
            total = total * 6364136223846793005 + fingerprint(tensor)
        return int(total.item())

    def state(self) -> dict:
        """The state for a worker that joins; its tensors are not copies."""
        counters = {"steps": self.optimizer.steps, "synced_steps": self.synced_steps}
        return {"built": self.built | self.bits, **counters, "tensors": self.tensors()}

    @torch.no_grad()
    def adopt(self, state: dict) -> None:
        """Continue from the state that the others share; this worker's own state is reset.

        Args:
            state: what another worker's `state` returned.

        Raises:
            FleetRefused: if the others have other settings, or compute other bits.
        """
        theirs = {key: value for key, value in state["built"].items() if key not in self.bits}
        if differing := differing_from(theirs, self.built):
            raise FleetRefused(
                f"the other workers are built otherwise: {differing}: start all of them alike"
            )
        unlike = [name for name, bits in self.bits.items() if state["built"].get(name) != bits]
        if unlike:
            raise FleetRefused(
                f"this worker gets other {unlike[0]} than the others: {WHY}, and every worker "
                f"decodes all messages: {INSTEAD}"
            )
        self.synced_steps = state["synced_steps"]
        for table, new in zip(self.tensors(), state["tensors"], strict=True):
            table.copy_(new)
        for batch in self.optimizer.batches:
            if batch.up.buffer is not None:
                batch.up.buffer.zero_()
            torch._foreach_copy_(batch.params, batch.as_parameters(batch.state["global_params"]))
        self.optimizer.resume_after(state["steps"])
        for reset in self._reset_inner:
            reset()

    def no_message(self) -> Tensor:
        """A placeholder of the size of a worker's message, uint8 (bytes,)."""
        size = sum(len(batch.params) * batch.up.size for batch in self.optimizer.batches)
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def messages_of(self, flat: Tensor) -> list[Tensor]:
        """Split a worker's message, uint8 (bytes,), into (layers, batch.up.size) per batch."""
        shapes = [(len(batch.params), batch.up.size) for batch in self.optimizer.batches]
        parts = flat.split([layers * size for layers, size in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def squared_length(self, flat: Tensor) -> float:
        """The squared Euclidean length of what a message decodes to. Waits for the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, rows in zip(self.optimizer.batches, self.messages_of(flat), strict=True):
            received = batch.up.decode(rows)
            total += torch.linalg.vector_norm(received, dtype=torch.float64).square()
        return total.item()

    @torch.no_grad()
    def broken(self) -> list[str]:
        """The names of layers whose parameters or state are not finite. Waits for the device."""
        broken: list[str] = []
        for batch in self.optimizer.batches:
            tables = [batch.models().float(), *batch.state.values()]
            fine = torch.stack([*map(finite, tables)]).all(0).tolist()
            broken += [name for name, is_fine in zip(batch.names, fine, strict=True) if not is_fine]
        return broken
