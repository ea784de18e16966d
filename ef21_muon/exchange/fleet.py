"""The workers of the moment, who come and go: their messages of a round. By torchft, an extra."""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from datetime import timedelta
from typing import Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from ef21_muon.exchange.admission import Card, FleetError, FleetRefused
from ef21_muon.exchange.collectives import Traffic, place_in
from ef21_muon.exchange.connections import Group, Manager, Transport, ask, let_go, size_of
from ef21_muon.exchange.lighthouse import Lighthouse
from ef21_muon.exchange.meeting import HEAD, HISTORY, Meeting, bytes_of, history_of
from ef21_muon.exchange.reach import INTERFACE, Place
from ef21_muon.exchange.verdict import Verdicts

log = logging.getLogger("ef21_muon")
# What goes wrong between workers is said here, in a line.
logging.getLogger("torchft.manager").setLevel(logging.CRITICAL)

NEVER = timedelta(days=1)
SLOWEST = 10e6 / 8  # bytes a second, at which the state of a worker that comes is fetched
PATIENCE = 10.0  # seconds, beside what something has to take
PAUSE = 0.2  # seconds between questions
AWAY = (TimeoutError, RuntimeError)  # what torchft raises where the lighthouse is


class Shared(Protocol):
    """What all workers share, and agree on bit for bit: as FleetSteps has it."""

    done: int
    built: Mapping[str, str]  # what has to be the same on all, by name

    def shared_state(self) -> dict: ...
    def take_shared_state(self, state: dict) -> None: ...
    def digest(self) -> int: ...
    def squared_length(self, message: Tensor) -> float: ...


class Fleet:
    """This worker among those of the moment, whom torchft's lighthouse knows.

    Every message follows a head, by which those with another history are told apart: theirs do not
    count, and they take over what the others share, as one does that comes anew or was away. What
    fails on the way costs another quorum and no local steps: the same message is sent again.
    A message that is not finite does not count, and all name its sender; one that is far longer
    than the others' counts, and is named too. Of two workers with one number, and of two runs at
    one lighthouse, the later is refused.

    worker: its number among all that there may be; lighthouse: the URL; host: by which others reach
    this one, its name by default, at whose address gloo listens unless GLOO_SOCKET_IFNAME names an
    interface; group: of the worker's own ranks, on the CPU. The lighthouse is waited for `patience`
    seconds, other workers as long as it takes. `while_waiting` is called again and again, with the
    seconds that it waits at most before the next call, and may raise.

    State is fetched from a peer by torchft over HTTP and unpickled: trust the network.
    """

    def __init__(
        self,
        worker: int,
        lighthouse: str,
        *,
        host: str | None = None,
        group: dist.ProcessGroup | None = None,
        patience: float = 600.0,
        while_waiting: Callable[[float], None] = lambda seconds: None,
    ):
        self.worker, self.lighthouse, self.group = worker, lighthouse, group
        local = urlsplit(lighthouse).hostname in ("localhost", "127.0.0.1", "::1")
        self.host = host or ("localhost" if local else socket.gethostname())
        self.patience, self.while_waiting = patience, while_waiting
        self.rank, self.ranks = place_in(group)
        self.manager: Manager | None = None
        self.healed = False  # in the last gather
        self.longest = 0.0  # seconds that a gather took
        self.waited = 0.0  # seconds, in all gathers
        self._lighthouse = Lighthouse(lighthouse, quiet=self.rank > 0)
        self._counters = {"step": 0, "batches_committed": 0}
        self._met = False
        self._verdicts = Verdicts(worker, quiet=self.rank > 0)

    def attach(self, shared: Shared) -> None:
        """Of what all workers share here."""
        self.shared = shared

    def state(self) -> dict[str, int]:
        """For a checkpoint: how far the fleet was."""
        return self.manager.state_dict() if self.manager else self._counters

    def load_state(self, state: dict[str, int]) -> None:
        """Before the first gather, with what was shared at that moment."""
        self._counters = state

    def gather(
        self, message: Tensor, counts: bool, finite: bool = True
    ) -> tuple[list[Tensor], Meeting]:
        """The messages of all who worked from the same state, as soon as they have come.

        In the order of workers, (bytes,) uint8 each, as `message`, which is of one size for all;
        counts: whether it stands for local steps; finite: whether what it was made of is.

        Raises FleetError where the lighthouse does not answer for `patience` seconds, FleetRefused
        where this worker cannot be among the others or Verdicts says so, and what `while_waiting`
        and `take_shared_state` raise; then nobody has to wait for this worker.
        """
        start = time.monotonic()
        try:
            if self.manager is None:
                self._enter()
            return self._gather(message, counts, finite)
        except BaseException:
            self.leave()
            raise
        finally:
            self.waited += time.monotonic() - start

    def _gather(self, message: Tensor, counts: bool, finite: bool) -> tuple[list[Tensor], Meeting]:
        start, tries, parted, traffic = time.monotonic(), 0, 0, Traffic()
        self.healed, apart, notes = False, False, []
        while True:
            tries += 1
            if not self._quorum():
                continue
            error = self._error()
            healed, broken, refused = self._of_all_ranks(
                self.healed, error is not None, isinstance(error, FleetRefused)
            )
            if refused:
                raise FleetRefused(str(error or "see what another rank of this worker says"))
            counts &= not healed
            rows, theirs = None, b""
            if not broken:
                mine = self._head(counts, finite)
                rows = self._send(torch.cat([bytes_of(mine), message.cpu()]), tries)
            if rows is not None:
                heads = [bytes(row.tolist()) for row in rows[:, : HEAD.size]]
                theirs = history_of(heads)
                traffic += self._traffic(message.numel(), len(rows))
                if mine[:HISTORY] != theirs:  # then the others commit, and are ahead
                    parted += 1
                    apart |= mine[:8] == theirs[:8]
                    self.manager.report_error(RuntimeError("another history than the others"))
            if not self._commit():
                notes += self._amiss()
                continue
            self._met = True
            self._forget_addresses()
            traffic += self.transport.traffic()
            workers = self.process_group.workers
            messages, step, said_finite = {}, None, set()
            for worker, head, row in zip(workers, heads, rows, strict=True):
                _, _, done, standing, is_finite = HEAD.unpack(head)
                if head[:HISTORY] == theirs and standing:
                    step, messages[worker] = done, row[HEAD.size :].to(message.device)
                    said_finite |= {worker} if is_finite else set()
            refused, found = self._judge(messages, said_finite, step)
            messages = [one for worker, one in messages.items() if worker not in refused]
            return messages, Meeting(
                messages=len(messages),
                step=step if messages else None,
                workers=workers,
                healed=self.healed,
                parted=parted,
                apart=apart,
                history=theirs.hex(),
                tries=tries,
                seconds=time.monotonic() - start,
                traffic=traffic,
                refused=tuple(refused),
                notes=tuple(notes + found),
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
        ((place, port, process, since),) = own
        state = size_of(self.shared.shared_state())
        self.healing = timedelta(seconds=PATIENCE + state / SLOWEST)
        self.transport = Transport(self.host, timeout=self.healing)
        self.process_group = Group(
            self.ranks,
            timeout=timedelta(seconds=PATIENCE),
            card=lambda: Card(self.worker, process, since, self._met, self.shared.built, place),
        )
        self.manager = self._new_manager(self.host, port)
        self.manager.load_state_dict(self._counters)

    def _listen(self) -> tuple[Place, int, int, float] | FleetRefused:
        """Where others reach this worker, the port of its store there, which process it is."""
        patience, until = timedelta(seconds=PATIENCE), time.monotonic() + PATIENCE
        while True:
            try:
                place = Place.here(self.host)
                self._store = dist.TCPStore(
                    self.host, 0, is_master=True, wait_for_workers=False, timeout=patience
                )
                return place, self._store.port, os.getpid(), time.time()
            except (OSError, RuntimeError) as error:
                if time.monotonic() > until:
                    return FleetRefused(
                        f"host={self.host} does not lead to this machine ({_in_a_line(error)}): "
                        "give a name or an address by which the other workers reach it "
                        "(membership.host)"
                    )
            self.while_waiting(PAUSE)
            time.sleep(PAUSE)

    def _new_manager(self, store: str, port: int) -> Manager:
        while True:
            self._lighthouse.is_away()
            try:
                manager = Manager(
                    pg=self.process_group,
                    state_dict=self.shared.shared_state,
                    load_state_dict=self._take,
                    min_replica_size=1,  # the lighthouse asks for more
                    use_async_quorum=False,
                    init_sync=False,
                    checkpoint_transport=self.transport,
                    replica_id=f"worker{self.worker}",
                    hostname=self.host,
                    rank=self.rank,
                    world_size=self.ranks,
                    store_addr=store,
                    store_port=port,
                    lighthouse_addr=self.lighthouse,
                    timeout=self.healing,
                    quorum_timeout=NEVER,
                    connect_timeout=timedelta(seconds=min(PATIENCE, self.patience)),
                    quorum_retries=int(NEVER.total_seconds()),
                )
                self._lighthouse.answers()
                return manager
            except AWAY as error:
                self._wait_for_the_lighthouse(error)

    def _wait_for_the_lighthouse(self, error: Exception) -> None:
        self.while_waiting(PAUSE)
        if self._lighthouse.is_away() > self.patience:
            raise FleetError(
                f"no answer of the lighthouse {self.lighthouse} for {self.patience:g} s: start it, "
                "or give the address where it is"
            ) from error
        time.sleep(PAUSE)

    def _take(self, state: dict) -> None:
        self.shared.take_shared_state(state)
        self.transport.received += size_of(state)
        self.healed = True

    def _quorum(self) -> bool:
        """Wait for the others; whether there is a quorum. `_take` may be called."""
        asked = ask(self.manager.start_quorum)
        while not wait([asked], timeout=PAUSE).done:
            self.while_waiting(PAUSE)
            self._lighthouse.look()
        if (error := asked.exception()) is None:
            self._lighthouse.answers()
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

    def _judge(
        self, messages: dict[int, Tensor], said_finite: set[int], step: int | None
    ) -> tuple[list[int], list[str]]:
        """Whose messages are not finite, and what there is to say of all of them."""
        squares = torch.tensor(
            [
                self.shared.squared_length(message) if worker in said_finite else torch.nan
                for worker, message in messages.items()
            ],
            dtype=torch.float64,
        )
        if self.ranks > 1:  # of the worker as a whole
            dist.all_reduce(squares, group=self.group)
        squares = dict(zip(messages, squares.tolist(), strict=True))
        all_workers = len(messages) == len(self.process_group.workers)
        return self._verdicts.of(squares, step, all_workers)

    def _head(self, counts: bool, finite: bool) -> bytes:
        digest = self.shared.digest()
        if self.ranks > 1:  # of the worker as a whole
            of_all = [None] * self.ranks
            dist.all_gather_object(of_all, (digest, finite), group=self.group)
            digests, all_finite = zip(*of_all, strict=True)
            digest, finite = sum(digests) % 2**64, all(all_finite)
        digest = digest.to_bytes(8, "big")
        return HEAD.pack(self.manager.batches_committed(), digest, self.shared.done, counts, finite)

    def _send(self, packed: Tensor, tries: int) -> Tensor | None:
        """All workers' heads and messages, (workers, bytes), or None where it failed."""
        ranks = self.process_group.size()
        flat = torch.empty(ranks * len(packed), dtype=torch.uint8)
        patience = PATIENCE + 5 * self.longest
        if not (self.longest and self.process_group.settled):  # somebody comes
            patience = (self.healing.total_seconds() + len(flat) / SLOWEST) * 2 ** (tries - 1)
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

    def _of_all_ranks(self, *flags: bool) -> tuple[bool, ...]:
        """Of each whether it holds on any rank of this worker."""
        if self.ranks == 1:
            return flags
        self.while_waiting(self.healing.total_seconds())  # the other ranks may still fetch theirs
        found = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return tuple(map(bool, found))

    def _traffic(self, size: int, ranks: int) -> Traffic:
        others = ranks - 1
        return Traffic(size, 0, others * size, others * (size + HEAD.size))

    def _forget_addresses(self) -> None:
        """Of gloo's, which all have read: a restarted lighthouse counts its quorums from 1 again.

        Where the store is this worker's.
        """
        if self.rank == 0:
            for key in self._store.list_keys():
                if "torchft/" in key:
                    self._store.delete_key(key)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
