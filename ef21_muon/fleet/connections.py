"""What is torchft's, fitted: the group of those that meet, state for who comes, the lighthouse."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures.thread import _threads_queues
from dataclasses import asdict, replace
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
        "workers that come and go need torchft, for Linux on x86-64: pip install 'ef21-muon[fleet]'"
    ) from error

# What goes wrong between workers is said by this library, in a line.
logging.getLogger("torchft.manager").setLevel(logging.CRITICAL)
DIRECT = build_opener(ProxyHandler({}))  # whatever the environment says of proxies
SILENCE = 10.0  # seconds without an answer of the lighthouse, after which it is said
LOOK = 5.0  # seconds between looks at the lighthouse, and for a connection to it


class Group(ProcessGroupGloo):
    """Of the workers of the moment, by their numbers; `settled` after their first gather.

    Before they connect they exchange what `card` gives. Then the workers that cannot be among the
    others have a FleetRefused as the manager's error, and the others a FleetError.
    """

    def __init__(self, ranks: int, timeout: timedelta, card: Callable[[], Card]):
        super().__init__(timeout)
        self.ranks, self.workers, self.settled = ranks, (), False
        self.card = card

    def configure(self, store, name, rank, size, quorum, group_rank, group_size, of_all) -> None:
        self.workers, self.settled = tuple(one // self.ranks for one in of_all), False
        try:
            super().configure(store, name, rank, size, quorum, group_rank, group_size, of_all)
        except dist.DistError as error:  # of the store, or of one that shows no card there
            meets_at = store.partition("/")[0]
            if size == 1 or not is_local(meets_at.rpartition(":")[0].strip("[]")):
                raise
            raise dist.DistError(
                f"they are to meet at {meets_at}, which other machines do not reach: where workers "
                f"are on several, give each its address there, membership.host=ADDRESS ({error})"
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
            options = Gloo._Options()
            options._timeout, options._devices = self._timeout, [Gloo.create_device(address)]
            backend = Gloo(store, rank, size, options)
        backend._set_sequence_number_for_group()
        group = dist.ProcessGroup(store, rank, size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return group

    def _exchange(self, store: dist.Store, rank: int, size: int) -> list[Card]:
        """The cards of all. One that has ended meanwhile shows none, which takes the timeout."""
        store.set(f"card/{rank}", json.dumps(asdict(self.card())))
        cards = [Card(**json.loads(store.get(f"card/{one}"))) for one in range(size)]
        if [card.worker for card in cards] != [*self.workers]:  # the lighthouse counts anew
            raise FleetError("a card of an earlier quorum of this number")
        return [replace(card, place=Place(**card.place)) for card in cards]


class StateServer(HTTPTransport):
    """Serves what is shared under this host's name, and counts its bytes. Never by a proxy."""

    def __init__(self, host: str, timeout: timedelta):
        self.host, self.traffic = host, Traffic()
        super().__init__(timeout=timeout, num_chunks=0)
        # A class of this server alone. Errors it still says.
        self._server.RequestHandlerClass.log_request = lambda *_: None

    @classmethod
    def _load_from_address(cls, address: str, timeout: timedelta) -> object:
        with DIRECT.open(address, timeout=timeout.total_seconds()) as answer:
            return _streaming_load(answer, weights_only=False)

    def address(self) -> str:
        return f"http://{self.host}:{urlsplit(super().address()).port}/checkpoint/"

    def send_checkpoint(self, dst_ranks, step, state_dict, timeout) -> None:
        sent = len(dst_ranks) * size_of(state_dict["user"]["default"])
        self.traffic += Traffic(wire_tx_bytes=sent)
        super().send_checkpoint(dst_ranks, step, state_dict, timeout)

    def counted(self) -> Traffic:
        """Since it was asked last."""
        traffic, self.traffic = self.traffic, Traffic()
        return traffic


def size_of(state: dict) -> int:
    """Bytes of the tensors of a shared state."""
    return sum(tensor.nbytes for tensor in state["tensors"])


class Lighthouse:
    """One that is waited for, which is said once after SILENCE, and once when it is there again.

    quiet: say nothing, as on all ranks of a worker but the first.
    """

    def __init__(self, url: str, quiet: bool):
        self.url, self.quiet = url, quiet
        self._since: float | None = None  # without an answer
        self._said = False
        self._looking: Future | None = None
        self._looked = time.monotonic()

    def is_away(self) -> float:
        """Note that it gives no answer; for how many seconds now."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= SILENCE and not (self._said or self.quiet):
            self._said = True
            log.warning("no answer of the lighthouse %s so far: waiting for it", self.url)
        return now - self._since

    def answers(self) -> None:
        """Note that it does."""
        if self._said:
            log.warning("the lighthouse %s answers", self.url)
        self._since, self._said, self._looking = None, False, None
        self._looked = time.monotonic()

    def look(self) -> None:
        """See whether it takes connections, now and then, while a question to it is open.

        torchft asks again and again then, and says nothing. Does not wait.
        """
        if self._looking is None and time.monotonic() - self._looked > LOOK and not self.quiet:
            self._looking = ask(self._connect)
        elif self._looking and self._looking.done():
            if self._looking.exception() is None:
                self.answers()
            else:
                self._looking, self._looked = None, time.monotonic()
                self.is_away()

    def _connect(self) -> None:
        url = urlsplit(self.url)
        socket.create_connection((url.hostname, url.port), timeout=LOOK).close()


def ask(call: Callable[[], None], device: torch.device | None = None) -> Future:
    """Call it in a thread of a daemon, which starts daemons, as the manager's own have to be.

    device: that of the tensors that the call copies: torchft waits for the thread's current one.
    """
    asked = Future()

    def answer() -> None:
        try:
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)
            asked.set_result(call())
        except Exception as error:
            asked.set_exception(error)

    Thread(target=answer, daemon=True).start()
    return asked


def let_go(executor: Executor) -> None:
    """A process that ends does not wait for these threads, which may wait for others for a day."""
    for thread in executor._threads:
        _threads_queues.pop(thread, None)
