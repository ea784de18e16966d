"""The transport of workers that come and go, as LocalSteps uses it."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ef21_muon.fleet.members import Members
from ef21_muon.fleet.shared import Shared
from ef21_muon.fleet.verdict import Quorum
from ef21_muon.local_steps import LocalSteps
from ef21_muon.transport.fixed import ALONE, Transport, packed

PAUSE = 2.0  # seconds between rounds for those that are late
FEW = 3  # layers, at most, that a warning names
QUORUMS = 1000  # at most, that are remembered for who asks for them

log = logging.getLogger("ef21_muon")


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
        self,
        worker: int,
        lighthouse: str,
        *,
        run: Mapping[str, object] | None = None,
        **options,  # of Members
    ):
        super().__init__(ALONE)  # a worker serves itself with all messages
        self.members = Members(worker, lighthouse, **options)
        self.run = dict(run or {})
        self.quorums: deque[Quorum] = deque(maxlen=QUORUMS)
        # Each worker has its own random numbers, as with fixed membership.
        self.stream = worker * self.members.ranks + self.members.rank

    def require_options(
        self, *, server: str, stagger: bool, delay: int, feedback: str, buffers: nn.Module | None
    ) -> str:
        """The placement. Raises ValueError for what cannot go on without a member."""
        refused = "is not allowed for workers that come and go"
        if server not in ("auto", "replicated"):
            raise ValueError(
                f"server={server!r} {refused}: a server would go with its worker, give replicated"
            )
        given = {"stagger": stagger, "delay": delay}
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
