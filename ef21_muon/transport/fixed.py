"""Messages between a fixed set of workers, by gloo or NCCL, and the one place that counts bytes.

Every layer has owner ranks, which play the server for it. Messages are uint8 buffers: for a bucket
of batches there is one per pair of ranks and direction, from workers to servers (w2s) and back
(s2w). Their sizes follow from the layers' shapes, so sizes are never sent. A message from a rank to
itself never leaves the rank.

The messages between pairs of ranks are one batch of sends and receives. gloo's `all_to_all_single`
uses a link in one direction at a time: 20 MB each way between two nodes at 100 Mbit/s took 3.1 s
with it, and 1.6 s with a batch of sends and receives.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from fractions import Fraction
from functools import partial
from operator import add
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ef21_muon.layers import Batch
from ef21_muon.transport.host import sends_by_nccl, sends_from_host, start_from_host, wait

# Given as a process group: this worker trains alone though others run, and nothing is sent.
ALONE: Final = "alone"
Group: TypeAlias = dist.ProcessGroup | Literal["alone"] | None
# The buffers that are received from each rank, and a function that waits until they are filled.
Incoming: TypeAlias = tuple[list[Tensor], Callable[[], None]]
# A generator that yields (send, batches, payloads) and is resumed with what `send` received.
Stages: TypeAlias = Generator[tuple[Callable, Sequence[Batch], Sequence[Tensor]], Any, Any]
# Its name from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Timer(Protocol):
    """Measures the phases of a step."""

    def phase(self, name: str | None) -> None:
        """Count the time from here on for this phase, or for none."""


def place_in(group: Group) -> tuple[int, int]:
    """This process's rank in the group and the number of ranks; (0, 1) without a process group."""
    if group == ALONE or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gathered(mine: Tensor, group: Group) -> Tensor:
    """The tensors of all ranks of the group, which have one shape, as (ranks, ...)."""
    if group == ALONE or place_in(group)[1] == 1:
        return mine[None]
    _, ranks = place_in(group)
    flat = mine.new_empty(ranks * mine.numel())
    wait([all_gather(flat, mine.flatten(), group, async_op=True)])
    return flat.view(ranks, *mine.shape)


class Traffic(NamedTuple):
    """Numbers of bytes; traffics add up field by field.

    Attributes:
        w2s_bytes: the size of this rank's messages to the servers.
        s2w_bytes: the size of the servers' messages back.
        received_bytes: the size of what this worker receives: the messages back or, where every
            worker is a server of all layers, the messages of the others.
        wire_tx_bytes: what this rank hands to the network. It may be a fraction, a mean over ranks:
            rings send parts of a buffer.
        wire_rx_bytes: what this rank takes from the network, likewise.
    """

    w2s_bytes: int = 0
    s2w_bytes: int = 0
    received_bytes: int = 0
    wire_tx_bytes: int | Fraction = 0
    wire_rx_bytes: int | Fraction = 0

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]  # no tuple's
        return Traffic(*map(add, self, other))

    def state(self) -> list[int]:
        """The counts as whole numbers, which `from_state` takes."""
        return [number for count in self for number in Fraction(count).as_integer_ratio()]

    @classmethod
    def from_state(cls, numbers: list[int]) -> "Traffic":
        """The traffic that `state` has been called of."""
        places = range(0, 2 * len(cls._fields), 2)
        counts = [Fraction(numbers[place], numbers[place + 1]) for place in places]
        whole = [int(one) if one.denominator == 1 else one for one in counts]
        return cls(*whole)  # type: ignore[arg-type]  # the first three are whole


class RoundInFlight:
    """A round whose first message is being sent.

    Args:
        stages: a generator of the round's stages. Where messages are due it yields (send, batches,
            payloads). `send(batches, payloads)` starts to send them and returns a function that
            waits for what arrives; the generator is resumed with what that function returns.
        timer: whose phase is "exchange" while messages are started and waited for.
    """

    def __init__(self, stages: Stages, timer: Timer):
        self.stages, self.timer = stages, timer
        self.wait: Callable[[], Any] | None = None
        self.advance()

    def advance(self) -> bool:
        """Wait for the messages in flight and run the next stage; False at the round's end."""
        arrived = None
        if self.wait:
            self.timer.phase("exchange")
            arrived = self.wait()
        try:
            send, batches, payloads = self.stages.send(arrived)
        except StopIteration:
            return False
        self.timer.phase("exchange")
        self.wait = send(batches, payloads)
        return True


def run(rounds: Iterable[Stages], timer: Timer) -> None:
    """Run rounds to their ends; all of them are in flight before the first is waited for."""
    in_flight: deque[RoundInFlight] = deque()
    for stages in rounds:
        in_flight.append(RoundInFlight(stages, timer))
    while in_flight:
        one = in_flight.popleft()
        if one.advance():
            in_flight.append(one)


class Transport:
    """Sends the messages of this rank to the servers of layers, and the servers' messages back.

    Args:
        group: the ranks that send to each other. None stands for all ranks of the default process
            group, or for this process alone where none is initialised; `ALONE` for this process.
        rank: this rank, for a dry run that sends nothing and only counts bytes, as for a plan.
            Payloads may then be on the meta device.
        ranks: the number of ranks of that dry run. By default messages are sent.

    Attributes:
        traffic: the bytes so far.
        heals: whether a worker whose parameters have diverged adopts those of the others, as in a
            fleet.
        stream: the number of this worker's random stream, if it is not its rank.
    """

    heals = False
    stream: int | None = None

    def __init__(self, group: Group = None, rank: int | None = None, ranks: int | None = None):
        self.sends = ranks is None
        self.group = None if group == ALONE else group
        here, all_ranks = place_in(group)
        self.rank: int = here if rank is None else rank
        self.ranks: int = all_ranks if ranks is None else ranks
        self.traffic = Traffic()

    def require_options(
        self,
        server: str,
        streaming: bool,
        sync_delay: int,
        feedback: str,
        buffers: nn.Module | None,
    ) -> str:
        """Check the options of LocalSteps; all of them go with this transport.

        Returns:
            The placement of the servers.
        """
        return server

    def attach(self, optimizer: Any) -> None:
        """Hold the optimizer that sends by this transport, where the transport has to know it."""

    def to_servers(
        self, batches: Sequence[Batch], payloads: Sequence[Tensor]
    ) -> Callable[[], Sequence[Sequence[Tensor]]]:
        """Start to send every layer's payload to its owners (line 12 of Algorithm 1).

        Args:
            batches: whose layers the payloads are of.
            payloads: per batch, uint8 (layers, batch.up.size).

        Returns:
            A function that waits and returns, per batch, the messages of all workers, each uint8
            (layers owned here, batch.up.size).
        """
        size = sum(map(Tensor.numel, payloads))
        self.traffic += Traffic(w2s_bytes=size)
        if self.ranks == 1:
            return partial(list, zip(payloads))
        sizes = [batch.up.size for batch in batches]
        if all(batch.replicated for batch in batches):
            self.traffic += Traffic(received_bytes=(self.ranks - 1) * size)
            parts, arrive = self._all_gather(packed(payloads))
        else:
            both = [*zip(batches, payloads, strict=True)]
            owners = range(self.ranks)
            messages = [packed([p[b.owned_by[owner]] for b, p in both]) for owner in owners]
            parts, arrive = self._exchange(messages, [len(messages[self.rank])] * self.ranks)

        def receive() -> list[list[Tensor]]:
            arrive()
            of_workers = [_rows(part, batches, sizes, self.rank) for part in parts]
            return [list(of_batch) for of_batch in zip(*of_workers, strict=True)]

        return receive

    def to_workers(
        self, batches: Sequence[Batch], payloads: Sequence[Tensor]
    ) -> Callable[[], Sequence[Tensor]]:
        """Start to send the payloads of the layers owned here to every rank (line 6).

        Args:
            batches: whose layers the payloads are of.
            payloads: per batch, uint8 (layers owned here, batch.down.size).

        Returns:
            A function that waits and returns, per batch, uint8 (layers, batch.down.size).
        """
        if self.ranks > 1 and all(batch.replicated for batch in batches):
            return lambda: payloads
        size = 0
        for batch in batches:
            size += len(batch.params) * batch.down.size
        self.traffic += Traffic(s2w_bytes=size, received_bytes=size)
        if self.ranks == 1:
            return partial(list, payloads)
        sizes = [batch.down.size for batch in batches]
        of_ranks = [sum(_lengths(batches, sizes, rank)) for rank in range(self.ranks)]
        parts, arrive = self._broadcast(packed(payloads), of_ranks)

        def receive() -> list[Tensor]:
            arrive()
            of_owners = [_rows(part, batches, sizes, rank) for rank, part in enumerate(parts)]
            return [torch.cat(of_batch) for of_batch in zip(*of_owners, strict=True)]

        return receive

    def resend(
        self, send: Callable, batches: Sequence[Batch], payloads: Sequence[Tensor]
    ) -> Callable:
        """Send what was in flight at a checkpoint once more; its bytes are counted already.

        Args:
            send: `to_servers` or `to_workers`, with whose arguments it is called.
            batches: see there.
            payloads: see there.

        Returns:
            What `send` returns.
        """
        counted = self.traffic
        receive = send(batches, payloads)
        self.traffic = counted
        return receive

    def _all_gather(self, message: Tensor) -> Incoming:
        """Start to gather the messages of all ranks, which have one size."""
        if self._from_host(message) or not self.sends:
            return self._exchange([message] * self.ranks, [len(message)] * self.ranks)
        self._count_wire((self.ranks - 1) * len(message), (self.ranks - 1) * len(message))
        flat = message.new_empty(self.ranks * len(message))
        work = all_gather(flat, message, self.group, async_op=True)
        return list(flat.view(self.ranks, -1)), partial(wait, [work])

    def _broadcast(self, message: Tensor, sizes: list[int]) -> Incoming:
        """Start to send the message to all ranks, and to receive `sizes[r]` bytes from rank r.

        NCCL broadcasts the message, once over every link; gloo sends it to each rank in turn.
        """
        if not (self.sends and sends_by_nccl(self.group, message.device)):
            return self._exchange([message] * self.ranks, sizes)
        sent = Fraction(sum(sizes) * (self.ranks - 1), self.ranks)
        self._count_wire(sent, sum(sizes) - len(message))
        received = [message.new_empty(size) for size in sizes]
        received[self.rank] = message
        works = [
            dist.broadcast(part, group=self.group, group_src=rank, async_op=True)
            for rank, part in enumerate(received)
            if len(part)
        ]
        return received, partial(wait, works)

    def _exchange(self, messages: Sequence[Tensor], sizes: Sequence[int]) -> Incoming:
        """Start to send message r to rank r, and to receive `sizes[r]` bytes from it."""
        received = [messages[0].new_empty(size) for size in sizes]
        received[self.rank] = messages[self.rank]
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        outgoing, incoming = ([many[rank] for rank in others] for many in (messages, received))
        self._count_wire(sum(map(len, outgoing)), sum(map(len, incoming)))
        if not self.sends:
            return received, lambda: None

        def send(outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[dist.Work]:
            transfers = [
                dist.P2POp(operation, tensor, group=self.group, group_peer=rank)
                for rank, *both in zip(others, outgoing, incoming, strict=True)
                for operation, tensor in zip((dist.isend, dist.irecv), both, strict=True)
                if len(tensor)
            ]
            return dist.batch_isend_irecv(transfers) if transfers else []

        if not self._from_host(messages[0]):
            return received, partial(wait, send(outgoing, incoming))
        return received, start_from_host(send, outgoing, incoming)

    def _from_host(self, message: Tensor) -> bool:
        """Whether a thread sends the message; it then goes from rank to rank, by no collective.

        Collectives of a group are matched in the order of their calls, which other threads make
        too.
        """
        return self.sends and sends_from_host(self.group, message.device)

    def _count_wire(self, sent: int | Fraction, received: int | Fraction) -> None:
        self.traffic += Traffic(wire_tx_bytes=sent, wire_rx_bytes=received)


def packed(payloads: Iterable[Tensor]) -> Tensor:
    """The payloads as one message, uint8 (bytes,)."""
    return torch.cat([payload.flatten() for payload in payloads])


def _rows(part: Tensor, batches: Sequence[Batch], sizes: Sequence[int], owner: int) -> list[Tensor]:
    """Split the payloads of the layers of `owner`, (bytes,), into (layers, size) per batch."""
    parts = part.split(_lengths(batches, sizes, owner))
    return [one.view(-1, size) for one, size in zip(parts, sizes, strict=True)]


def _lengths(batches: Sequence[Batch], sizes: Sequence[int], owner: int) -> list[int]:
    """The bytes, per batch, of the layers of `owner`; sizes: the bytes per layer."""
    owned = (len(batch.params[batch.owned_by[owner]]) for batch in batches)
    return [layers * size for layers, size in zip(owned, sizes, strict=True)]
