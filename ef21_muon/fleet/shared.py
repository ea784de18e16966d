"""What all workers share of LocalSteps bit for bit, and how a worker takes it over."""

import hashlib
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from ef21_muon.arithmetic import WHY, digests, of_messages
from ef21_muon.fleet.admission import FleetRefused, differing_from
from ef21_muon.fleet.verdict import INSTEAD
from ef21_muon.inner import beginner
from ef21_muon.layers import finite
from ef21_muon.local_steps import LocalSteps
from ef21_muon.transport.agreement import fingerprint

TABLES = ("model_shift", "server_momentum")  # of a batch's state, that all workers hold alike


class Shared:
    """W and the outer momentum V of an optimizer, its steps, and the local steps in W of all.

    built: by name what has to be the same on all workers, of the optimizer and of `run`, which
    holds for names that both have; bits: of what every worker computes for itself, fingerprints.
    """

    def __init__(self, optimizer: LocalSteps, run: Mapping[str, object]):
        self.optimizer, self.synced_steps = optimizer, 0
        settings = {**run, **optimizer._built_as, **run}
        self.built = {key: str(value) for key, value in settings.items()}
        messages = chain(*(of_messages(way, optimizer.rules) for way in ("s2w", "w2s")))
        self.bits = {f"bits of {name}": str(bits) for name, bits in digests(messages).items()}
        told = repr(sorted((self.built | self.bits).items())).encode()
        self._digest_of_built = int.from_bytes(hashlib.sha256(told).digest()[:7], "big")
        self._begin_inner = [beginner(inner) for inner in optimizer.inner]

    @property
    def device(self) -> torch.device:
        return self.optimizer.batches[0].params[0].device

    def tensors(self) -> list[Tensor]:
        """W and V of every batch."""
        self.optimizer.require_own_parameters("what workers share")
        states = [batch.state for batch in self.optimizer.batches]
        return [state[table] for state in states for table in TABLES if table in state]

    def fingerprint(self) -> int:
        """Of all that workers share, and how they are built, an int64. Waits for the device."""
        total = torch.full((), self._digest_of_built, dtype=torch.int64, device=self.device)
        for tensor in self.tensors():
            total = total * 6364136223846793005 + fingerprint(tensor)
        return total.item()

    def state(self) -> dict:
        """For a worker that comes; its tensors are not copies."""
        counters = {"steps": self.optimizer.steps, "synced_steps": self.synced_steps}
        return {"built": self.built | self.bits, **counters, "tensors": self.tensors()}

    @torch.no_grad()
    def take(self, state: dict) -> None:
        """Go on from what the others share; this worker's own state begins anew.

        Raises FleetRefused where they are built otherwise.
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
            if batch.up.memory is not None:
                batch.up.memory.zero_()
            torch._foreach_copy_(batch.params, batch.as_parameters(batch.state["model_shift"]))
        self.optimizer.go_on_after(state["steps"])
        for begin_anew in self._begin_inner:
            begin_anew()

    def no_message(self) -> Tensor:
        """Of the size that each worker's flat message has."""
        size = sum(len(batch.params) * batch.up.size for batch in self.optimizer.batches)
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def messages_of(self, flat: Tensor) -> list[Tensor]:
        """Of every batch what a worker's flat message has, (layers, bytes)."""
        shapes = [(len(batch.params), batch.up.size) for batch in self.optimizer.batches]
        parts = flat.split([layers * size for layers, size in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def squared_length(self, flat: Tensor) -> float:
        """Of what a worker's flat message says. Waits for the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, rows in zip(self.optimizer.batches, self.messages_of(flat), strict=True):
            received = batch.up.decode(rows)
            total += torch.linalg.vector_norm(received, dtype=torch.float64).square()
        return total.item()

    @torch.no_grad()
    def broken(self) -> list[str]:
        """The layers whose parameters or state are not finite here. Waits for the device."""
        broken = []
        for batch in self.optimizer.batches:
            tables = [batch.models().float(), *batch.state.values()]
            fine = torch.stack([*map(finite, tables)]).all(0).tolist()
            broken += [name for name, is_fine in zip(batch.names, fine, strict=True) if not is_fine]
        return broken
