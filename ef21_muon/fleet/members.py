"""The workers of the moment, who come and go: how this one meets them, and gets their messages."""

import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from datetime import timedelta
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
    ask,
    let_go,
    size_of,
)
from ef21_muon.fleet.verdict import HEAD, Head, Quorum, Verdicts, history_of
from ef21_muon.transport.fixed import Traffic, place_in
from ef21_muon.transport.reach import INTERFACE, Place

log = logging.getLogger("ef21_muon")

NEVER = timedelta(days=1)
SLOWEST = 10e6 / 8  # bytes a second, at which the state of a worker that comes is fetched
PATIENCE = 10.0  # seconds, beside what something has to take
DOUBLINGS = 10  # at most, of the patience with a message, in as many tries
PAUSE = 0.2  # seconds between questions
AWAY = (TimeoutError, RuntimeError)  # what torchft raises where the lighthouse is


class Members:
    """A worker's place among those of the moment: options as in Fleet.

    Every message follows a head, by which those with another history are told apart: theirs do not
    count, and they take over what the others share, as one does that comes anew or was away. What
    fails on the way costs another quorum and no local steps: the same message is sent again.
    """

    shared = None  # what this worker has to share, from before the first gather on

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
        self.manager: Manager | None = None
        self.workers: tuple[int, ...] = ()  # in the last gather
        self.healed = False  # in the last gather
        self.longest = 0.0  # seconds that a gather took
        self.waited = 0.0  # seconds, in all gathers
        self.lighthouse = Lighthouse(lighthouse, quiet=self.rank > 0)
        self.counters = {"step": 0, "batches_committed": 0}  # how far the fleet was at the start
        self._verdicts = Verdicts(worker, quiet=self.rank > 0)

    def gather(
        self, message: Tensor, counts: bool, finite: bool = True
    ) -> tuple[list[Tensor], Quorum]:
        """The messages of all who worked from the same state, in the order of workers.

        (bytes,) uint8 each, as `message`, which is of one size for all. counts: whether it stands
        for local steps; finite: whether what it was made of is.
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
        tries, diverged, same_messages, notes, traffic = 0, 0, False, [], Traffic()
        self.healed = False
        while True:
            tries += 1
            if not self._quorum():
                continue
            error = self._error()
            healed, broken, refused = self._total(
                self.healed, error is not None, isinstance(error, FleetRefused)
            )
            if refused:
                raise FleetRefused(str(error or "see what another rank of this worker says"))
            counts &= not healed
            rows = None
            if not broken:
                mine = self._head(counts, finite)
                rows = self._send(torch.cat([mine.packed(), message.cpu()]), tries)
            if rows is not None:
                others = len(rows) - 1
                on_wire = others * (len(message) + HEAD.size)
                traffic += Traffic(len(message), 0, others * len(message), on_wire, on_wire)
                heads = [Head.unpacked(row) for row in rows[:, : HEAD.size]]
                history = history_of(heads)
                if mine.history != history:  # then the others commit, and are ahead
                    diverged += 1
                    same_messages |= mine.committed == history[0]
                    self.manager.report_error(RuntimeError("another history than the others"))
            if self._commit():
                break
            notes += self._amiss()
        self._forget_addresses()
        self.workers = self.process_group.workers
        sent = {
            worker: (head, row[HEAD.size :].to(message.device))
            for worker, head, row in zip(self.workers, heads, rows, strict=True)
            if head.history == history and head.counts
        }
        squares = (
            self.shared.squared_length(one) if head.finite else torch.nan
            for head, one in sent.values()
        )
        squares = dict(zip(sent, self._total(*squares, dtype=torch.float64), strict=True))
        steps = max((head.steps for head, _ in sent.values()), default=None)
        refused, found = self._verdicts.of(squares, steps, len(sent) == len(self.workers))
        self._verdicts.note_diverged(same_messages)
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
            traffic=traffic + self.state_server.counted(),
            refused=tuple(refused),
            notes=(*notes, *found),
        )

    def leave(self) -> None:
        """The others need not wait for this one any more."""
        if self.manager:
            let_go(self.manager._executor)
            self.manager.shutdown(wait=False)
            self.process_group.shutdown()

    def _enter(self) -> None:
        """From here on the others wait for this worker, so it is as late as can be."""
        # A store of this start's own: torchrun's outlives a restart, with the keys of the dead.
        own = [self._listen() if self.rank == 0 else None]
        if self.ranks > 1:
            dist.broadcast_object_list(own, group=self.group, group_src=0)
        if isinstance(own[0], FleetRefused):
            raise own[0]
        ((card, port),) = own
        self.healing = timedelta(seconds=PATIENCE + size_of(self.shared.state()) / SLOWEST)
        self.state_server = StateServer(self.host, self.healing)
        self.process_group = Group(
            self.ranks, timedelta(seconds=PATIENCE), lambda: replace(card, met=bool(self.workers))
        )
        self.manager = self._new_manager(port)
        self.manager.load_state_dict(self.counters)

    def _listen(self) -> tuple[Card, int] | FleetRefused:
        """What this worker says of itself to others, and the port of its store."""
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

    def _new_manager(self, port: int) -> Manager:
        while True:
            self.lighthouse.is_away()
            try:
                manager = Manager(
                    pg=self.process_group,
                    state_dict=self.shared.state,
                    load_state_dict=self._take,
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
                self.lighthouse.answers()
                return manager
            except AWAY as error:
                self._wait_for_the_lighthouse(error)

    def _wait_for_the_lighthouse(self, error: Exception) -> None:
        self.while_waiting(PAUSE)
        if self.lighthouse.is_away() > self.patience:
            raise FleetError(
                f"no answer of the lighthouse {self.lighthouse.url} for {self.patience:g} s: start "
                "it, or give the address where it is"
            ) from error
        time.sleep(PAUSE)

    def _take(self, state: dict) -> None:
        self.shared.take(state)
        size = size_of(state)
        self.state_server.traffic += Traffic(received_bytes=size, wire_rx_bytes=size)
        self.healed = True

    def _quorum(self) -> bool:
        """Wait for the others; whether there is a quorum. `_take` may be called."""
        asked = ask(self.manager.start_quorum, self.shared.device)
        while not wait([asked], timeout=PAUSE).done:
            self.while_waiting(PAUSE)
            self.lighthouse.look()
        if (error := asked.exception()) is None:
            self.lighthouse.answers()
            return True
        if not isinstance(error, AWAY):
            raise error
        self.manager._quorum_future = None  # else it raises the same again
        self._wait_for_the_lighthouse(error)
        return False

    def _error(self) -> Exception | None:
        """What went wrong since the last quorum was asked for."""
        found = self.manager.errored()
        return found and found.original_exception

    def _amiss(self) -> list[str]:
        """Say why a quorum made no round; what the others are refused for, for the record."""
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

    def _head(self, counts: bool, finite: bool) -> Head:
        digest, broken = self._total(self.shared.fingerprint(), not finite)
        committed, steps = self.manager.batches_committed(), self.shared.optimizer.steps
        return Head(committed, digest % 2**64, steps, counts, not broken)

    def _send(self, packed: Tensor, tries: int) -> Tensor | None:
        """All workers' heads and messages, (workers, bytes), or None where it failed."""
        ranks = self.process_group.size()
        flat = torch.empty(ranks * len(packed), dtype=torch.uint8)
        patience = PATIENCE + 5 * self.longest
        if not (self.longest and self.process_group.settled):  # somebody comes
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
        """Whether this worker has the round; others may have it."""
        self.while_waiting(self.healing.total_seconds())  # of one that still fetches its state
        try:
            return self.manager.should_commit()
        except AWAY:
            return False

    def _total(self, *numbers: float, dtype: torch.dtype = torch.int64) -> list:
        """Of each the sum over the ranks of this worker, of integers modulo 2^64."""
        total = torch.tensor(numbers, dtype=dtype)
        if self.ranks > 1:
            self.while_waiting(self.healing.total_seconds())  # others may still fetch their state
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def _forget_addresses(self) -> None:
        """Of gloo's, which all have read: a lighthouse that starts anew counts quorums anew."""
        if self.rank == 0:
            for key in self._store.list_keys():
                if "torchft/" in key:
                    self._store.delete_key(key)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
