"""The transport of LocalSteps for workers that come and go."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ef21_muon.fleet.members import Members
from ef21_muon.fleet.shared import SharedState
from ef21_muon.fleet.verdict import Quorum
from ef21_muon.layers import Batch
from ef21_muon.local_steps import LocalSteps
from ef21_muon.transport.fixed import ALONE, Transport, packed

PAUSE = 2.0  # seconds between rounds for workers that are late
FEW = 3  # layers, at most, that a warning names
QUORUMS = 1000  # the results of so many rounds are kept

log = logging.getLogger("ef21_muon")


class Fleet(Transport):
    """The transport of LocalSteps for workers that come and go; every round is of those present.

    W becomes the average over the messages that were sent in a round. A worker that is new, was
    away or has another W than the others (a digest of it is compared in every round) adopts what
    the others share: W, the outer momentum V and the step. Its own state, the errors e_j and the
    state of inner optimizers, is reset, and its message of that round does not count, since it was
    made from another W. A message that is not finite counts on no worker; every worker names its
    sender in the log, and the sender's own state is reset. A message that is far longer than those
    of the others counts, and is named too. Every worker is a server of all layers.

    Call `join` before the first step. Every round leaves its result in `quorums`. It needs torchft
    (`pip install 'ef21-muon[fleet]'`) and a lighthouse, a process that workers find each other by:
    `torchft_lighthouse --min_replicas 1`. Workers fetch state from each other by HTTP and unpickle
    it, so use it in a network that you trust.

    Args:
        worker: the number of this worker, from 0, unlike that of all others. Of two workers with
            one number the later one is refused.
        lighthouse: the URL of torchft's lighthouse, "http://HOST:PORT". Of two runs at one
            lighthouse, the later one is refused.
        run: by name, settings beside the optimizer's that have to be the same on all workers, such
            as those of the data. None by default.
        host: the name or address by which other workers reach this machine. By default the
            machine's name, or "localhost" if the lighthouse is there. gloo listens at its address,
            unless GLOO_SOCKET_IFNAME names an interface.
        group: the ranks of this worker, a gloo process group, if there are several, each with a
            Fleet of its own. By default one rank.
        patience: how long to wait for an answer of the lighthouse, in seconds, 600 by default.
            Other workers are waited for as long as it takes.
        while_waiting: a function that is called again and again during a wait, with the time in
            seconds after which it is called next, at the latest. It may raise, which ends the
            wait. By default it does nothing.

    Attributes:
        quorums: the results of the last 1000 rounds.
        members: the membership of this worker.

    Raises:
        FleetError: from `join` and rounds, if the lighthouse gives no answer.
        FleetRefused: from `join` and rounds, if this worker cannot be among the others. After any
            error, also one of `while_waiting`, the others do not wait for this worker any more.

    Example:
        >>> fleet = Fleet(0, "http://localhost:29510")
        >>> inner = torch.optim.AdamW(model.parameters())
        >>> optimizer = LocalSteps(inner, sync_every=30, transport=fleet)
        >>> fleet.join()
        >>> while optimizer.steps < 3000:
        ...     model(next(batches)).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.final_sync()
        >>> fleet.leave()

    References:
        Douillard et al., DiLoCo, arXiv:2311.08105.
        torchft, https://github.com/meta-pytorch/torchft.
    """

    heals = True

    optimizer: LocalSteps
    shared: SharedState

    def __init__(
        self,
        worker: int,
        lighthouse: str,
        *,
        run: Mapping[str, object] | None = None,
        host: str | None = None,
        group: dist.ProcessGroup | None = None,
        patience: float = 600.0,
        while_waiting: Callable[[float], None] = lambda seconds: None,
    ):
        super().__init__(ALONE)  # every worker is a server: nothing is sent beside the messages
        self.members = Members(worker, lighthouse, host, group, patience, while_waiting)
        self.run = dict(run or {})
        self.quorums: deque[Quorum] = deque(maxlen=QUORUMS)
        # Each worker has its own random numbers, as with fixed membership.
        self.stream = worker * self.members.ranks + self.members.rank

    def require_options(
        self,
        server: str,
        streaming: bool,
        sync_delay: int,
        feedback: str,
        buffers: nn.Module | None,
    ) -> str:
        """Check the options of LocalSteps.

        Returns:
            The placement of the servers, "replicated".

        Raises:
            ValueError: for an option that does not work when a worker leaves.
        """
        refused = "is not allowed for workers that come and go"
        if server not in ("auto", "replicated"):
            raise ValueError(
                f"server={server!r} {refused}: a server may leave with its worker, give replicated"
            )
        options = {"streaming": streaming, "sync_delay": sync_delay}
        if given := " with ".join(f"{key}={value}" for key, value in options.items() if value):
            raise ValueError(f"{given} {refused}: they exchange whole rounds, leave it out")
        if buffers is not None:
            raise ValueError(
                "buffers are not averaged over workers that come and go: leave them out, and "
                "normalise without running statistics"
            )
        if feedback == "ef21":
            raise ValueError(
                f"feedback='ef21' {refused}: its servers hold the mean of all workers' G_j, "
                "give ef14 or none"
            )
        return "replicated"

    def attach(self, optimizer: LocalSteps) -> None:
        """Hold the optimizer that sends by this transport; the end of its constructor calls it."""
        self.optimizer, self.shared = optimizer, SharedState(optimizer, self.run)
        self.members.shared = self.shared

    @property
    def synced_steps(self) -> int:
        """The number of local steps of all workers that W consists of."""
        return self.shared.synced_steps

    def digest(self) -> int:
        """A checksum, below 2^64, of the shared state and the settings. Waits for the device."""
        return self.shared.fingerprint() % 2**64

    def to_servers(
        self, batches: Sequence[Batch], payloads: Sequence[Tensor]
    ) -> Callable[[], list[list[Tensor]]]:
        """Return a function that exchanges the messages; per batch it returns those that count."""
        return partial(self._exchange_round, packed(payloads))

    def to_workers(
        self, batches: Sequence[Batch], payloads: Sequence[Tensor]
    ) -> Callable[[], Sequence[Tensor]]:
        """Send nothing: every worker is a server of all layers."""
        return lambda: payloads

    @torch.no_grad()
    def join(self) -> None:
        """Join the others in their current round, and continue from their state.

        Raises:
            FleetError: if the lighthouse gives no answer.
            FleetRefused: if this worker cannot be among the others.
        """
        messages = self._exchange_round()
        if any(messages) or self.members.healed:
            self.optimizer.apply_messages(messages)

    @torch.no_grad()
    def wait_for_peers(self, workers: int, seconds: float) -> None:
        """After the last step: wait until so many workers have reached it.

        A worker that was lost in the last round adopts the state of the others meanwhile.

        Args:
            workers: the number of all workers.
            seconds: how long to wait at most.
        """
        until = time.monotonic() + seconds
        while len(self.members.workers) < workers and time.monotonic() < until:
            time.sleep(PAUSE)
            self._exchange_round()

    def leave(self) -> None:
        """Leave the fleet: the others continue without this worker."""
        self.members.leave()

    def state(self) -> dict[str, int]:
        """The counters of the fleet, to be saved beside the optimizer's state."""
        manager = self.members.manager
        counters = manager.state_dict() if manager else self.members.counters
        return {"synced_steps": self.synced_steps, **counters}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Load what `state` returned, after the optimizer's state and before `join`."""
        self.members.counters = dict(state)
        self.shared.synced_steps = self.members.counters.pop("synced_steps")

    def __getstate__(self) -> dict:
        raise TypeError("a worker among others that come and go cannot be copied: save its state")

    def _exchange_round(self, message: Tensor | None = None) -> list[list[Tensor]]:
        """The messages that count, per batch; this worker's own may be missing.

        Args:
            message: of this worker's local steps; None if there were none since the last round.
        """
        optimizer, shared, counts = self.optimizer, self.shared, message is not None
        optimizer.require_own_parameters("a round")
        broken = shared.broken()
        if broken and counts:
            names = ", ".join(broken[:FEW])
            log.warning("%s is not finite after step %s", names, optimizer.steps)
        message = shared.no_message() if message is None else message
        messages, quorum = self.members.gather(message, counts, finite=not broken)
        if self.members.worker in quorum.refused:
            shared.adopt(shared.state())
        if quorum.step is not None:  # messages count
            optimizer.steps = quorum.step
            _, place, _ = optimizer.rounds.of(quorum.step - 1)
            shared.synced_steps += len(messages) * (place + 1)
        self.traffic += quorum.traffic
        self.quorums.append(quorum)
        of_workers = [shared.messages_of(one) for one in messages]
        return [[rows[b] for rows in of_workers] for b in range(len(optimizer.batches))]
