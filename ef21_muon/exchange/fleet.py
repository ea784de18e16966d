"""The workers of the moment, who come and go: their messages of a round. By torchft, an extra."""

import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from concurrent.futures.thread import _threads_queues
from dataclasses import dataclass
from datetime import timedelta
from struct import Struct
from threading import Thread
from typing import Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from ef21_muon.exchange.collectives import Traffic, place_in

os.environ.setdefault("RUST_LOG", "warn")  # or torchft says six lines a round
try:
    from torchft import Manager, ProcessGroupGloo
    from torchft.checkpointing.http_transport import HTTPTransport
except ImportError as error:
    raise ImportError(
        "workers that come and go need torchft, for Linux on x86-64: pip install 'ef21-muon[fleet]'"
    ) from error

# Or it warns, at every change, that NCCL has no flight recorder.
logging.getLogger("torchft.manager").setLevel(logging.ERROR)

# Before a message: the messages in W so far, a digest of what all workers share, the steps that the
# message was made after, and whether it counts.
HEAD = Struct(">Q8sQ?")
HISTORY = 16  # bytes, of the first two
NEVER = timedelta(days=1)
SLOWEST = 10e6 / 8  # bytes a second, at which the state of a worker that comes is fetched
PATIENCE = 10.0  # seconds, beside what something has to take
PAUSE = 0.2  # seconds between questions
AWAY = (TimeoutError, RuntimeError)  # what torchft raises where the lighthouse is


class FleetError(ConnectionError):
    """The other workers are out of reach. One line: what is so, and what to do."""


class Shared(Protocol):
    """What all workers share, and agree on bit for bit: as FleetSteps has it."""

    done: int

    def shared_state(self) -> dict: ...
    def take_shared_state(self, state: dict) -> None: ...
    def digest(self) -> int: ...


@dataclass(frozen=True)
class Meeting:
    """Of a round of workers.

    messages: how many count; step: up to which they tell, None without one; workers: the
    numbers of those that met; healed: whether this one took over what the others share; parted: how
    often it found that it had another history than others; apart: whether of as many messages;
    history: in hexadecimal, how many messages there were before and the digest of what all shared;
    tries: quorums that it took; seconds: of waiting and sending; traffic: bytes of all tries.
    """

    messages: int
    step: int | None
    workers: tuple[int, ...]
    healed: bool
    parted: int
    apart: bool
    history: str
    tries: int
    seconds: float
    traffic: Traffic


class Fleet:
    """This worker among those of the moment, whom torchft's lighthouse knows.

    Every message follows a head, by which those with another history are told apart: theirs do not
    count, and they take over what the others share, as one does that comes anew or was away. What
    fails on the way costs another quorum and no local steps: the same message is sent again.

    worker: its number among all that there may be; lighthouse: the URL; host: by which others reach
    this one, its name by default; group: of the worker's own ranks, on the CPU. The lighthouse is
    waited for `patience` seconds, other workers as long as it takes. `while_waiting` is called
    again and again, with the seconds that it waits at most before the next call, and may raise.

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
        self._away_since: float | None = None
        self._counters = {"step": 0, "batches_committed": 0}

    def attach(self, shared: Shared) -> None:
        """Of what all workers share here."""
        self.shared = shared

    def state(self) -> dict[str, int]:
        """For a checkpoint: how far the fleet was."""
        return self.manager.state_dict() if self.manager else self._counters

    def load_state(self, state: dict[str, int]) -> None:
        """Before the first gather, with what was shared at that moment."""
        self._counters = state

    def gather(self, message: Tensor, counts: bool) -> tuple[list[Tensor], Meeting]:
        """The messages of all who worked from the same state, as soon as they have come.

        In the order of workers, (bytes,) uint8 each, as `message`, which is of one size for all;
        counts: whether it stands for local steps.

        Raises FleetError where the lighthouse does not answer for `patience` seconds, and what
        `while_waiting` and `take_shared_state` raise; then nobody has to wait for this worker.
        """
        if self.manager is None:
            self._enter(message)
        start = time.monotonic()
        try:
            return self._gather(message, counts)
        except BaseException:
            self.leave()
            raise
        finally:
            self.waited += time.monotonic() - start

    def _gather(self, message: Tensor, counts: bool) -> tuple[list[Tensor], Meeting]:
        start, tries, parted, traffic = time.monotonic(), 0, 0, Traffic()
        self.healed = apart = False
        while True:
            tries += 1
            if not self._quorum():
                continue
            healed, broken = self._of_all_ranks(self.healed, bool(self.manager.errored()))
            counts &= not healed
            rows, theirs = None, b""
            if not broken:
                mine = self._head(counts)
                rows = self._send(torch.cat([_bytes(mine), message.cpu()]), tries)
            if rows is not None:
                heads = [bytes(row.tolist()) for row in rows[:, : HEAD.size]]
                theirs = _history(heads)
                traffic += self._traffic(message.numel(), len(rows))
                if mine[:HISTORY] != theirs:  # then the others commit, and are ahead
                    parted += 1
                    apart |= mine[:8] == theirs[:8]
                    self.manager.report_error(FleetError("another history than the others"))
            if not self._commit():
                continue
            self._forget_addresses()
            traffic += self.transport.traffic()
            told = [HEAD.unpack(head) for head in heads]
            counted = [place for place, head in enumerate(heads) if head[:HISTORY] == theirs]
            counted = [place for place in counted if told[place][-1]]
            messages = [rows[place, HEAD.size :].to(message.device) for place in counted]
            return messages, Meeting(
                messages=len(messages),
                step=told[counted[0]][2] if counted else None,
                workers=self.process_group.workers,
                healed=self.healed,
                parted=parted,
                apart=apart,
                history=theirs.hex(),
                tries=tries,
                seconds=time.monotonic() - start,
                traffic=traffic,
            )

    def leave(self) -> None:
        """The others need not wait for this one any more."""
        if self.manager:
            _let_go(self.manager._executor)
            self.manager.shutdown(wait=False)
            self.process_group.shutdown()

    def _enter(self, message: Tensor) -> None:
        """From here on the others wait for this worker, so it is as late as can be."""
        # A store of this start's own: torchrun's outlives a restart, with the keys of the dead.
        address = [None]
        if self.rank == 0:
            self._store = dist.TCPStore(self.host, 0, is_master=True, wait_for_workers=False)
            address = [(self.host, self._store.port)]
        if self.ranks > 1:
            dist.broadcast_object_list(address, group=self.group, group_src=0)
        ((host, port),) = address
        state = _size(self.shared.shared_state())
        self.healing = timedelta(seconds=PATIENCE + state / SLOWEST)
        self.transport = Transport(self.host, timeout=self.healing)
        self.process_group = Group(self.ranks, timeout=timedelta(seconds=PATIENCE))
        self.manager = self._new_manager(host, port)
        self.manager.load_state_dict(self._counters)

    def _new_manager(self, store: str, port: int) -> Manager:
        while True:
            try:
                return Manager(
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
            except AWAY as error:
                self._wait_for_the_lighthouse(error)

    def _wait_for_the_lighthouse(self, error: Exception) -> None:
        self.while_waiting(PAUSE)
        self._away_since = self._away_since or time.monotonic()
        if time.monotonic() - self._away_since > self.patience:
            raise FleetError(
                f"no answer of the lighthouse {self.lighthouse} for {self.patience:g} s: start it, "
                "or give the address where it is"
            ) from error
        time.sleep(PAUSE)

    def _take(self, state: dict) -> None:
        self.shared.take_shared_state(state)
        self.transport.received += _size(state)
        self.healed = True

    def _quorum(self) -> bool:
        """Wait for the others; whether there is a quorum. `_take` may be called."""
        asked = Future()
        # Threads that a daemon starts, as the manager's own, are daemons.
        Thread(target=_answer, args=(asked, self.manager.start_quorum), daemon=True).start()
        while not wait([asked], timeout=PAUSE).done:
            self.while_waiting(PAUSE)
        if (error := asked.exception()) is None:
            self._away_since = None
            return True
        if not isinstance(error, AWAY):
            raise error
        self.manager._quorum_future = None  # else it raises the same again
        self._wait_for_the_lighthouse(error)
        return False

    def _head(self, counts: bool) -> bytes:
        digest = self.shared.digest()
        if self.ranks > 1:  # of the worker as a whole
            of_all = [None] * self.ranks
            dist.all_gather_object(of_all, digest, group=self.group)
            digest = sum(of_all) % 2**64
        digest = digest.to_bytes(8, "big")
        return HEAD.pack(self.manager.batches_committed(), digest, self.shared.done, counts)

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


class Group(ProcessGroupGloo):
    """Of the workers of the moment, by their numbers; `settled` after their first gather."""

    def __init__(self, ranks: int, timeout: timedelta):
        super().__init__(timeout)
        self.ranks, self.workers, self.settled = ranks, (), False

    def configure(self, store, name, rank, size, quorum, group_rank, group_size, of_all) -> None:
        self.workers, self.settled = tuple(one // self.ranks for one in of_all), False
        super().configure(store, name, rank, size, quorum, group_rank, group_size, of_all)


class Transport(HTTPTransport):
    """Serves what is shared under this host's name, and counts its bytes."""

    def __init__(self, host: str, timeout: timedelta):
        self.host, self.received, self.sent = host, 0, 0
        super().__init__(timeout=timeout, num_chunks=0)

    def address(self) -> str:
        return f"http://{self.host}:{urlsplit(super().address()).port}/checkpoint/"

    def send_checkpoint(self, dst_ranks, step, state_dict, timeout) -> None:
        self.sent += len(dst_ranks) * _size(state_dict["user"]["default"])
        super().send_checkpoint(dst_ranks, step, state_dict, timeout)

    def traffic(self) -> Traffic:
        """Since it was asked last."""
        traffic = Traffic(0, 0, self.received, self.sent)
        self.received = self.sent = 0
        return traffic


def _history(heads: list[bytes]) -> bytes:
    """The one that goes on: of most messages, then of most workers."""
    histories = [head[:HISTORY] for head in heads]
    return max(histories, key=lambda one: (one[:8], histories.count(one), one))


def _size(state: dict) -> int:
    """Bytes of the tensors of a shared state."""
    return sum(tensor.nbytes for tensor in state["tensors"])


def _answer(asked: Future, call: Callable[[], None]) -> None:
    try:
        asked.set_result(call())
    except Exception as error:
        asked.set_exception(error)


def _let_go(executor: Executor) -> None:
    """A process that ends does not wait for these threads, which may wait for others for a day."""
    for thread in executor._threads:
        _threads_queues.pop(thread, None)


def _bytes(head: bytes) -> Tensor:
    return torch.frombuffer(bytearray(head), dtype=torch.uint8)
