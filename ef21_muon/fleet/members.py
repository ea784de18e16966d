"""Membership of a fleet: how a worker joins a quorum and gathers the messages of a round."""

import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from ef21_muon.fleet.admission import Card, FleetError, FleetRefused
from ef21_muon.fleet.connections import (
    Group,
    Lighthouse,
    Manager,
    StateServer,
    abandon,
    in_daemon,
    size_of,
)
from ef21_muon.fleet.shared import SharedState
from ef21_muon.fleet.verdict import HEADER, Header, MessageChecks, Quorum, history_of
from ef21_muon.transport.fixed import Traffic, place_in
from ef21_muon.transport.reach import INTERFACE, Place

log = logging.getLogger("ef21_muon")

NEVER = timedelta(days=1)
SLOWEST = 10e6 / 8  # bytes per second: a joining worker is expected to fetch the state faster
PATIENCE = 10.0  # seconds, beyond what a transfer has to take
DOUBLINGS = 10  # at most, of the patience with a message, one per try
PAUSE = 0.2  # seconds between calls of `while_waiting`
AWAY = (TimeoutError, RuntimeError)  # what torchft raises where the lighthouse gives no answer


class Members:
    """A worker's membership in a fleet: it joins quorums and gathers messages in them.

    A header precedes every message. The headers show which workers have another history: their
    messages do not count, and they adopt the state of the others, as a worker does that is new or
    was away. If an exchange fails, the same message is sent again in another quorum; no local steps
    are lost.

    Args:
        worker: see Fleet, as for all others.
        lighthouse: see Fleet.
        host: see Fleet.
        group: see Fleet.
        patience: see Fleet.
        while_waiting: see Fleet.

    Attributes:
        shared: what workers share; to be set before the first gather.
        workers: the numbers of the workers in the last gather.
        healed: whether this worker adopted the others' state in the last gather.
        longest: the longest time that a gather took, in seconds.
        waited: the time that all gathers took, in seconds.
        counters: the fleet's counters at the start, from which torchft's manager counts on.
        manager: torchft's Manager, whose package has no types; None before the first gather.
    """

    shared: SharedState
    manager: Any = None

    def __init__(
        self,
        worker: int,
        lighthouse: str,
        host: str | None = None,
        group: dist.ProcessGroup | None = None,
        patience: float = 600.0,
        while_waiting: Callable[[float], None] = lambda seconds: None,
    ):
        self.worker, self.group = worker, group
        local = urlsplit(lighthouse).hostname in ("localhost", "127.0.0.1", "::1")
        self.host = host or ("localhost" if local else socket.gethostname())
        self.patience, self.while_waiting = patience, while_waiting
        self.rank, self.ranks = place_in(group)
        self.workers: tuple[int, ...] = ()
        self.healed = False
        self.longest = self.waited = 0.0
        self.lighthouse = Lighthouse(lighthouse, quiet=self.rank > 0)
        self.counters = {"step": 0, "batches_committed": 0}
        self._checks = MessageChecks(worker, quiet=self.rank > 0)

    def gather(
        self, message: Tensor, counts: bool, finite: bool = True
    ) -> tuple[list[Tensor], Quorum]:
        """Send a message to all workers of a quorum, and gather theirs.

        Args:
            message: uint8 (bytes,), of one size on all workers.
            counts: whether it stands for local steps.
            finite: whether the parameters and state that it was made from are finite.

        Returns:
            The messages that count, in the order of workers, and the round's result.

        Raises:
            FleetError: if the lighthouse gives no answer for `patience` seconds.
            FleetRefused: if this worker cannot be among the others.
        """
        start = time.monotonic()
        try:
            if self.manager is None:
                self._enter()
            return self._gather(message, counts, finite, start)
        except BaseException:
            self.leave()
            raise
        finally:
            self.waited += time.monotonic() - start

    def _gather(
        self, message: Tensor, counts: bool, finite: bool, start: float
    ) -> tuple[list[Tensor], Quorum]:
        tries, diverged, same_messages, traffic = 0, 0, False, Traffic()
        notes: list[str] = []
        rows: Tensor | list[Tensor] = []
        headers: list[Header] = []
        self.healed = False
        while True:
            tries += 1
            if not self._quorum():
                continue
            error = self._error()
            healed, failed, unwanted = self._total(
                self.healed, error is not None, isinstance(error, FleetRefused)
            )
            if unwanted:
                raise FleetRefused(str(error or "see what another rank of this worker says"))
            counts &= not healed
            gathered = None
            if not failed:
                mine = self._header(counts, finite)
                gathered = self._send(torch.cat([mine.packed(), message.cpu()]), tries)
            if gathered is not None:
                rows, others = gathered, len(gathered) - 1
                on_wire = others * (len(message) + HEADER.size)
                traffic += Traffic(len(message), 0, others * len(message), on_wire, on_wire)
                headers = [Header.unpacked(row) for row in gathered[:, : HEADER.size]]
                history = history_of(headers)
                if mine.history != history:  # then the others commit, and are ahead
                    diverged += 1
                    same_messages |= mine.committed == history[0]
                    self.manager.report_error(RuntimeError("another history than the others"))
            if self._commit():
                break
            notes += self._report_failure()
        self._forget_addresses()
        self.workers = self.process_group.workers
        sent = {
            worker: (header, row[HEADER.size :].to(message.device))
            for worker, header, row in zip(self.workers, headers, rows, strict=True)
            if header.history == history and header.counts
        }
        of_ranks = (
            self.shared.squared_length(one) if header.finite else torch.nan
            for header, one in sent.values()
        )
        squares = dict(zip(sent, self._total(*of_ranks, dtype=torch.float64), strict=True))
        steps = max((header.steps for header, _ in sent.values()), default=None)
        refused, found = self._checks.check(squares, steps, len(sent) == len(self.workers))
        self._checks.note_diverged(same_messages)
        messages = [one for worker, (_, one) in sent.items() if worker not in refused]
        return messages, Quorum(
            messages=len(messages),
            step=steps if messages else None,
            workers=self.workers,
            healed=self.healed,
            diverged=diverged,
            history="{:016x}{:016x}".format(*history),
            tries=tries,
            seconds=time.monotonic() - start,
            traffic=traffic + self.state_server.read_traffic(),
            refused=tuple(refused),
            notes=(*notes, *found),
        )

    def leave(self) -> None:
        """Leave the fleet, so that the others need not wait for this worker any more."""
        if self.manager:
            abandon(self.manager._executor)
            self.manager.shutdown(wait=False)
            self.process_group.shutdown()

    def _enter(self) -> None:
        """Enter the fleet, as late as can be: from then on the others wait for this worker."""
        # A store of this start's own: torchrun's outlives a restart, with the keys of dead workers.
        own = [self._listen() if self.rank == 0 else None]
        if self.ranks > 1:
            dist.broadcast_object_list(own, group=self.group, group_src=0)
        if own[0] is None or isinstance(own[0], FleetRefused):
            raise own[0] or FleetError("rank 0 of this worker has sent no address")
        card, port = own[0]
        self.healing = timedelta(seconds=PATIENCE + size_of(self.shared.state()) / SLOWEST)
        self.state_server = StateServer(self.host, self.healing)
        self.process_group = Group(
            self.ranks,
            timedelta(seconds=PATIENCE),
            lambda: replace(card, has_synced=bool(self.workers)),
        )
        self.manager = self._new_manager(port)
        self.manager.load_state_dict(self.counters)

    def _listen(self) -> tuple[Card, int] | FleetRefused:
        """This worker's card and the port of its store, or the error if it cannot listen."""
        patience, until = timedelta(seconds=PATIENCE), time.monotonic() + PATIENCE
        while True:
            try:
                place, built = Place.here(self.host), self.shared.built
                self._store = dist.TCPStore(
                    self.host, 0, is_master=True, wait_for_workers=False, timeout=patience
                )
                card = Card(self.worker, os.getpid(), time.time(), False, built, place)
                return card, self._store.port
            except (OSError, RuntimeError) as error:
                if time.monotonic() > until:
                    return FleetRefused(
                        f"host={self.host} does not lead to this machine ({_in_a_line(error)}): "
                        "give a name or an address by which the other workers reach it "
                        "(membership.host)"
                    )
            self.while_waiting(PAUSE)
            time.sleep(PAUSE)

    def _new_manager(self, port: int) -> Any:
        while True:
            self.lighthouse.note_silence()
            try:
                manager = Manager(
                    pg=self.process_group,
                    state_dict=self.shared.state,
                    load_state_dict=self._adopt,
                    min_replica_size=1,  # the lighthouse asks for more
                    use_async_quorum=False,
                    init_sync=False,
                    checkpoint_transport=self.state_server,
                    replica_id=f"worker{self.worker}",
                    hostname=self.host,
                    rank=self.rank,
                    world_size=self.ranks,
                    store_addr=self.host,
                    store_port=port,
                    lighthouse_addr=self.lighthouse.url,
                    timeout=self.healing,
                    quorum_timeout=NEVER,
                    connect_timeout=timedelta(seconds=min(PATIENCE, self.patience)),
                    quorum_retries=int(NEVER.total_seconds()),
                )
                self.lighthouse.note_answer()
                return manager
            except AWAY as error:
                self._wait_for_the_lighthouse(error)

    def _wait_for_the_lighthouse(self, error: Exception) -> None:
        self.while_waiting(PAUSE)
        if self.lighthouse.note_silence() > self.patience:
            raise FleetError(
                f"no answer of the lighthouse {self.lighthouse.url} for {self.patience:g} s: start "
                "it, or give the address where it is"
            ) from error
        time.sleep(PAUSE)

    def _adopt(self, state: dict) -> None:
        self.shared.adopt(state)
        size = size_of(state)
        self.state_server.traffic += Traffic(received_bytes=size, wire_rx_bytes=size)
        self.healed = True

    def _quorum(self) -> bool:
        """Wait for the others; returns whether there is a quorum. `_adopt` may be called."""
        quorum = in_daemon(self.manager.start_quorum, self.shared.device)
        while not wait([quorum], timeout=PAUSE).done:
            self.while_waiting(PAUSE)
            self.lighthouse.check()
        if (error := quorum.exception()) is None:
            self.lighthouse.note_answer()
            return True
        if not isinstance(error, AWAY):
            raise error
        self.manager._quorum_future = None  # else it raises the same again
        self._wait_for_the_lighthouse(error)
        return False

    def _error(self) -> Exception | None:
        """The manager's error since the last quorum began."""
        found = self.manager.errored()
        return found and found.original_exception

    def _report_failure(self) -> list[str]:
        """Log why a quorum made no round.

        Returns:
            Why workers were refused, for the record.
        """
        if (error := self._error()) is None:
            return []
        reason = _in_a_line(error)
        if "connectFullMesh" in reason:
            reason = f"they do not reach each other, give {INTERFACE} if this lasts ({reason})"
        of_all_ranks = isinstance(error, FleetError)
        if self.rank == 0 or not of_all_ranks:
            workers = ", ".join(map(str, self.process_group.workers))
            log.warning("worker %s: no round of workers %s: %s", self.worker, workers, reason)
        return [reason] if of_all_ranks else []

    def _header(self, counts: bool, finite: bool) -> Header:
        digest, broken = self._total(self.shared.fingerprint(), not finite)
        committed, steps = self.manager.batches_committed(), self.shared.optimizer.steps
        return Header(committed, digest % 2**64, steps, counts, not broken)

    def _send(self, packed: Tensor, tries: int) -> Tensor | None:
        """The headers and messages of all workers, (workers, bytes); None if this failed."""
        ranks = self.process_group.size()
        flat = torch.empty(ranks * len(packed), dtype=torch.uint8)
        patience = PATIENCE + 5 * self.longest
        if not (self.longest and self.process_group.settled):  # a worker is new
            patience = self.healing.total_seconds() + len(flat) / SLOWEST
            patience *= 2 ** min(tries - 1, DOUBLINGS)
        options = AllgatherOptions()
        options.timeout = timedelta(seconds=patience)
        self.while_waiting(patience)
        start = time.monotonic()
        try:
            # Gloo's coalesced gather would not look at the timeout.
            self.process_group.parent._allgather_base(flat, packed, options).wait()
        except RuntimeError as error:
            self.manager.report_error(error)
            return None
        if self.process_group.settled:
            self.longest = max(self.longest, time.monotonic() - start)
        self.process_group.settled = True
        return flat.view(ranks, len(packed))

    def _commit(self) -> bool:
        """Whether this worker has completed the round; others may have completed it in any case."""
        self.while_waiting(self.healing.total_seconds())  # another worker may still fetch its state
        try:
            return self.manager.should_commit()
        except AWAY:
            return False

    def _total(self, *numbers: float, dtype: torch.dtype = torch.int64) -> list:
        """The sum of each number over the ranks of this worker; of integers modulo 2^64."""
        total = torch.tensor(numbers, dtype=dtype)
        if self.ranks > 1:
            self.while_waiting(self.healing.total_seconds())  # others may still fetch their state
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def _forget_addresses(self) -> None:
        """Delete gloo's addresses, which all workers have read.

        A lighthouse that starts again counts quorums from 0, and would lead to old addresses.
        """
        if self.rank == 0:
            for key in self._store.list_keys():
                if "torchft/" in key:
                    self._store.delete_key(key)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
