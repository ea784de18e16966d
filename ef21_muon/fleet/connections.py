"""torchft's parts, adapted: the process group, the transfer of state, and the lighthouse."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.thread import _threads_queues
from dataclasses import asdict
from datetime import timedelta
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo as Gloo

from ef21_muon.fleet.admission import Card, FleetError, FleetRefused, refusals
from ef21_muon.transport.fixed import Traffic
from ef21_muon.transport.reach import Place, is_local

log = logging.getLogger("ef21_muon")
os.environ.setdefault("RUST_LOG", "warn")  # or torchft says six lines a round
try:
    from torchft import Manager as Manager
    from torchft import ProcessGroupGloo
    from torchft.checkpointing._serialization import _streaming_load
    from torchft.checkpointing.http_transport import HTTPTransport
except ImportError as error:
    raise ImportError(
        "workers that come and go need torchft: pip install 'ef21-muon[fleet]', on Linux on x86-64 "
        "with Python 3.13 or older"
    ) from error

# This library reports what goes wrong between workers, in one line.
logging.getLogger("torchft.manager").setLevel(logging.CRITICAL)
DIRECT = build_opener(ProxyHandler({}))  # ignores the proxies that the environment names
SILENCE = 10.0  # seconds without an answer of the lighthouse, after which a warning is logged
CHECK_EVERY = 5.0  # seconds between checks of the lighthouse, and for a connection to it


class Group(ProcessGroupGloo):
    """The process group of the workers of a quorum.

    Before workers connect they exchange their cards. If some cannot be in the fleet, the manager's
    error is a FleetRefused on those and a FleetError on the others.

    Args:
        ranks: the number of ranks of each worker.
        timeout: of a connection.
        card: returns this worker's card.

    Attributes:
        workers: the numbers of the workers of the last quorum.
        settled: whether these workers have exchanged messages since they connected.
    """

    def __init__(self, ranks: int, timeout: timedelta, card: Callable[[], Card]):
        super().__init__(timeout)
        self.ranks, self.settled, self.card = ranks, False, card
        self.workers: tuple[int, ...] = ()

    def configure(
        self,
        store: str,
        name: str,
        rank: int,
        size: int,
        quorum: int | None,
        group_rank: int | None,
        group_size: int | None,
        of_all: list[int],
    ) -> None:
        """Connect the workers of a quorum; called by torchft's manager."""
        self.workers, self.settled = tuple(one // self.ranks for one in of_all), False
        try:
            super().configure(store, name, rank, size, quorum, group_rank, group_size, of_all)
        except dist.DistError as error:  # of the store, or a worker has sent no card
            address = store.partition("/")[0]
            if size == 1 or not is_local(address.rpartition(":")[0].strip("[]")):
                raise
            raise dist.DistError(
                f"the workers' store is at {address}, which other machines do not reach: if "
                f"workers are on several, give each its address there, membership.host=ADDRESS "
                f"({error})"
            ) from error

    def _create_pg(self, store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
        cards = self._exchange(store, rank, size)
        refused = refusals(cards)
        if rank in refused:
            raise FleetRefused(refused[rank])
        if refused:
            raise FleetError(
                "; ".join(f"{cards[place]} is refused: {refused[place]}" for place in refused)
            )
        if (address := cards[rank].place.address) is None:
            backend = Gloo(store, rank, size, self._timeout)  # by GLOO_SOCKET_IFNAME
        else:
            options = Gloo._Options()  # type: ignore[attr-defined]  # no stub
            options._timeout, options._devices = self._timeout, [Gloo.create_device(address)]
            backend = Gloo(store, rank, size, options)
        backend._set_sequence_number_for_group()
        group = dist.ProcessGroup(store, rank, size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return group

    def _exchange(self, store: dist.Store, rank: int, size: int) -> list[Card]:
        """The cards of all workers; waits for the timeout if a worker has ended meanwhile."""
        store.set(f"card/{rank}", json.dumps(asdict(self.card())))
        received = [json.loads(store.get(f"card/{one}")) for one in range(size)]
        cards = [Card(**one | {"place": Place(**one["place"])}) for one in received]
        if [card.worker for card in cards] != [*self.workers]:  # the lighthouse counts from 0 again
            raise FleetError("a card of an earlier quorum of this number")
        return cards


class StateServer(HTTPTransport):
    """Sends the shared state to workers that ask for it by HTTP, without a proxy; counts its bytes.

    Args:
        host: the name or address by which other workers reach this one.
        timeout: of a transfer.
    """

    def __init__(self, host: str, timeout: timedelta):
        self.host, self.traffic = host, Traffic()
        super().__init__(timeout=timeout, num_chunks=0)
        # A class of this server alone. Errors are still logged.
        self._server.RequestHandlerClass.log_request = lambda *_: None

    @classmethod
    def _load_from_address(cls, address: str, timeout: timedelta) -> object:
        with DIRECT.open(address, timeout=timeout.total_seconds()) as answer:
            return _streaming_load(answer, weights_only=False)

    def address(self) -> str:
        """The URL of the state, with this host's name."""
        return f"http://{self.host}:{urlsplit(super().address()).port}/checkpoint/"

    def send_checkpoint(
        self, dst_ranks: list[int], step: int, state_dict: dict, timeout: timedelta
    ) -> None:
        """Offer the state to other workers; called by torchft's manager."""
        sent = len(dst_ranks) * size_of(state_dict["user"]["default"])
        self.traffic += Traffic(wire_tx_bytes=sent)
        super().send_checkpoint(dst_ranks, step, state_dict, timeout)

    def read_traffic(self) -> Traffic:
        """The traffic since the last call."""
        traffic, self.traffic = self.traffic, Traffic()
        return traffic


def size_of(state: dict) -> int:
    """The bytes of the tensors of a shared state."""
    return sum(tensor.nbytes for tensor in state["tensors"])


class Lighthouse:
    """Logs a warning after SILENCE seconds without an answer, and another when it answers again.

    Args:
        url: the lighthouse's address, http://HOST:PORT.
        quiet: whether to log nothing, as on all ranks of a worker but the first.
    """

    def __init__(self, url: str, quiet: bool):
        self.url, self.quiet = url, quiet
        self._silent_since: float | None = None
        self._warned = False
        self._connecting: Future | None = None
        self._checked = time.monotonic()

    def note_silence(self) -> float:
        """Note that it gives no answer.

        Returns:
            For how many seconds it has given none.
        """
        now = time.monotonic()
        self._silent_since = now if self._silent_since is None else self._silent_since
        if now - self._silent_since >= SILENCE and not (self._warned or self.quiet):
            self._warned = True
            log.warning("no answer of the lighthouse %s so far: waiting for it", self.url)
        return now - self._silent_since

    def note_answer(self) -> None:
        """Note that it answers."""
        if self._warned:
            log.warning("the lighthouse %s answers", self.url)
        self._silent_since, self._warned, self._connecting = None, False, None
        self._checked = time.monotonic()

    def check(self) -> None:
        """Check every CHECK_EVERY seconds whether it accepts connections. Does not wait.

        To be called while torchft waits for its answer: torchft retries and logs nothing.
        """
        due = time.monotonic() - self._checked > CHECK_EVERY
        if self._connecting is None and due and not self.quiet:
            self._connecting = in_daemon(self._connect)
        elif self._connecting and self._connecting.done():
            if self._connecting.exception() is None:
                self.note_answer()
            else:
                self._connecting, self._checked = None, time.monotonic()
                self.note_silence()

    def _connect(self) -> None:
        url = urlsplit(self.url)
        socket.create_connection((url.hostname, url.port), timeout=CHECK_EVERY).close()


def in_daemon(call: Callable[[], object], device: torch.device | None = None) -> Future:
    """Call a function in a daemon thread. Threads that it starts are daemons too.

    Args:
        call: the function.
        device: of the tensors that the call copies, since torchft waits for the current device of
            the thread.

    Returns:
        The future of what the call returns.
    """
    result: Future = Future()

    def answer() -> None:
        try:
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    Thread(target=answer, daemon=True).start()
    return result


def abandon(executor: ThreadPoolExecutor) -> None:
    """Have the process end without these threads, which may wait for other workers for a day."""
    for thread in executor._threads:
        _threads_queues.pop(thread, None)  # type: ignore[attr-defined]  # a WeakKeyDictionary
