"""The transport of workers that come and go, as LocalSteps uses it, and what they share."""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ef21_muon.arithmetic import WHY, digests, of_messages
from ef21_muon.channel import finite
from ef21_muon.fleet.admission import FleetRefused, differing_from
from ef21_muon.fleet.members import Members
from ef21_muon.fleet.verdict import INSTEAD, Quorum
from ef21_muon.inner import beginner
from ef21_muon.local_steps import LocalSteps
from ef21_muon.transport.agreement import fingerprint
from ef21_muon.transport.fixed import ALONE, Transport, packed

PAUSE = 2.0  # seconds between rounds for those that are late
FEW = 3  # layers, at most, that a warning names
TABLES = ("global_params", "server_momentum")  # of a batch's state, that all workers hold alike
QUORUMS = 1000  # at most, that are remembered for who asks for them

log = logging.getLogger("ef21_muon")


class Shared:
    """W and the outer momentum V of an optimizer, its steps, and the local steps in W of all.

    built: by name what has to be the same on all workers, of the optimizer and of `run`, which
    holds for names that both have; bits: of what every worker computes for itself, fingerprints.
    """

    def __init__(self, optimizer: LocalSteps, run: Mapping[str, object]):
        self.optimizer, self.device, self.synced_steps = optimizer, optimizer.device, 0
        settings = {**run, **optimizer._built_as, **run}
        self.built = {key: str(value) for key, value in settings.items()}
        messages = chain(*(of_messages(way, optimizer.rules) for way in ("s2w", "w2s")))
        self.bits = {f"bits of {name}": str(bits) for name, bits in digests(messages).items()}
        text = repr(sorted((self.built | self.bits).items())).encode()
        self._digest_of_built = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        self._begin_inner = [beginner(inner) for inner in optimizer.inner]

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
            if batch.up.buffer is not None:
                batch.up.buffer.zero_()
            torch._foreach_copy_(batch.params, batch.as_parameters(batch.state["global_params"]))
        self.optimizer.resume_after(state["steps"])
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


class Fleet(Transport):
    """Rounds of LocalSteps that go on with the workers that are there, each with one message.

    The mean of a round is over the messages that came. A worker that comes anew, was away, or has
    another W (`digest` is compared in every round) takes over what the others share: W, the outer
    momentum V and the step. Its own state, e_j and that of inner optimizers, begins anew, and its
    message of that round, which was made from another W, does not count. A message that is not
    finite does not count on any worker, all name its sender, and that begins anew; one that is far
    longer than the others' counts, and is named too. Every worker serves all layers. `join()` comes
    before the first step; every round leaves its result in `quorums`.

    worker: its number among all that there may be; lighthouse: the URL of torchft's, which is
    waited for `patience` seconds, other workers as long as it takes; host: by which others reach
    this one, its name by default, at whose address gloo listens unless GLOO_SOCKET_IFNAME names an
    interface; group: of the worker's own ranks, on the CPU, where it has several, each with a
    fleet; while_waiting: is called again and again, with the seconds that it waits at most before
    the next call, and may raise; run: what else has to be the same on all, as the values of a
    configuration by name. Of two workers with one number, and of two runs at one lighthouse, the
    later is refused. State is fetched from a peer by HTTP and unpickled: trust the network.

    `join` and rounds raise FleetError where the lighthouse does not answer, FleetRefused where this
    worker cannot be among the others, and what `while_waiting` does; then nobody waits for it.
    """

    heals = True

    def __init__(
        self, worker: int, lighthouse: str, *, run: Mapping[str, object] | None = None, **options
    ):
        super().__init__(ALONE)  # a worker serves itself with all messages
        self.members = Members(worker, lighthouse, **options)
        self.run = dict(run or {})
        self.quorums: deque[Quorum] = deque(maxlen=QUORUMS)
        # Each worker has its own random numbers, as with fixed membership.
        self.stream = worker * self.members.ranks + self.members.rank

    def require_options(
        self,
        *,
        server: str,
        streaming: bool,
        sync_delay: int,
        feedback: str,
        buffers: nn.Module | None,
    ) -> str:
        """The placement. Raises ValueError for what cannot go on without a member."""
        refused = "is not allowed for workers that come and go"
        if server not in ("auto", "replicated"):
            raise ValueError(
                f"server={server!r} {refused}: a server would go with its worker, give replicated"
            )
        given = {"streaming": streaming, "sync_delay": sync_delay}
        if given := " with ".join(f"{key}={value}" for key, value in given.items() if value):
            raise ValueError(f"{given} {refused}: they meet in whole rounds, leave it out")
        if buffers is not None:
            raise ValueError(
                "buffers are not averaged over workers that come and go: leave them out, and "
                "normalise without running statistics"
            )
        if feedback == "ef21":
            raise ValueError(
                f"feedback='ef21' {refused}: its servers remember the mean of all workers, give "
                "ef14 or none"
            )
        return "replicated"

    def attach(self, optimizer: LocalSteps) -> None:
        """The last of what its constructor does."""
        self.optimizer, self.shared = optimizer, Shared(optimizer, self.run)
        self.members.shared = self.shared

    @property
    def synced_steps(self) -> int:
        """Local steps in W, of all workers."""
        return self.shared.synced_steps

    def digest(self) -> int:
        """Of all that workers share, and how they are built, below 2^64. Waits for the device."""
        return self.shared.fingerprint() % 2**64

    def to_servers(self, batches: Sequence, payloads: list[Tensor]) -> Callable[[], list]:
        """What is returned meets the others, and gives of every batch the messages that count."""
        return partial(self._meet, packed(payloads))

    def to_workers(self, batches: Sequence, payloads: list[Tensor]) -> Callable[[], list]:
        return lambda: payloads

    @torch.no_grad()
    def join(self) -> None:
        """Meet the others in the round that they are in, and go on from where they are."""
        messages = self._meet()
        if any(messages) or self.members.healed:
            self.optimizer.meet(messages)

    @torch.no_grad()
    def wait_for_peers(self, workers: int, seconds: float) -> None:
        """After the last step: wait for all `workers` to come to it, at most so many seconds.

        One that was lost in the last round takes over what the others share.
        """
        until = time.monotonic() + seconds
        while len(self.members.workers) < workers and time.monotonic() < until:
            time.sleep(PAUSE)
            self._meet()

    def leave(self) -> None:
        """Let the others go on without this worker."""
        self.members.leave()

    def state(self) -> dict[str, int]:
        """Beside the optimizer's state: how far all workers were."""
        manager = self.members.manager
        counters = manager.state_dict() if manager else self.members.counters
        return {"synced_steps": self.synced_steps, **counters}

    def load_state(self, state: Mapping[str, int]) -> None:
        """With the optimizer's state that was loaded, before `join`."""
        self.members.counters = dict(state)
        self.shared.synced_steps = self.members.counters.pop("synced_steps")

    def __getstate__(self) -> dict:
        raise TypeError("a worker among others that come and go cannot be copied: save its state")

    def _meet(self, message: Tensor | None = None) -> list[list[Tensor]]:
        """Of every batch the messages that count; this worker's own may be missing."""
        optimizer, shared, counts = self.optimizer, self.shared, message is not None
        optimizer.require_own_parameters("a round")
        broken = shared.broken()
        if broken and counts:
            names = ", ".join(broken[:FEW])
            log.warning("%s is not finite after step %s", names, optimizer.steps)
        message = message if counts else shared.no_message()
        messages, quorum = self.members.gather(message, counts, finite=not broken)
        if self.members.worker in quorum.refused:
            shared.take(shared.state())
        if messages:
            optimizer.steps = quorum.step
            _, place, _ = optimizer.rounds.of(quorum.step - 1)
            shared.synced_steps += len(messages) * (place + 1)
        self.traffic += quorum.traffic
        self.quorums.append(quorum)
        of_workers = [shared.messages_of(one) for one in messages]
        return [[rows[b] for rows in of_workers] for b in range(len(optimizer.batches))]
