"""Messages between workers that stay, by gloo or NCCL, and the one place that counts their bytes.

Every layer has owners, the ranks that play the server for it. Messages are uint8 buffers, one each
way for a bucket of batches and a pair of ranks: from workers to servers (w2s) and back (s2w). Sizes
follow from shapes, so none travel. A message to oneself never leaves the rank.

Between pairs they go as one batch of sends and receives: gloo's `all_to_all_single` uses a link in
one direction at a time (20 MB each way between two nodes at 100 Mbit/s: 3.1 s, and 1.6 s so).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from fractions import Fraction
from functools import partial
from operator import add
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ef21_muon.transport.host import sends_by_nccl, sends_from_host, start_from_host, wait

# Given for a process group, a worker is alone though others run: nothing is sent.
ALONE = "alone"
Group: TypeAlias = dist.ProcessGroup | str | None
# What is received of each rank, and what waits until it is there.
Incoming: TypeAlias = tuple[list[Tensor], Callable[[], None]]
# Its name from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def place_in(group: Group) -> tuple[int, int]:
    """This process's rank in the group and the group's size; alone without a process group."""
    if group == ALONE or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gathered(mine: Tensor, group: Group) -> Tensor:
    """What every rank of the group has, all of one shape, (ranks, ...)."""
    _, ranks = place_in(group)
    if ranks == 1:
        return mine[None]
    flat = mine.new_empty(ranks * mine.numel())
    wait([all_gather(flat, mine.flatten(), group, async_op=True)])
    return flat.view(ranks, *mine.shape)


class Traffic(NamedTuple):
    """Bytes: of this rank's messages to the servers and back, what it receives, and what it sends.

    What a worker receives is what comes back from the servers, or the messages of the others where
    every worker serves. What a rank hands to the network and takes from it may be a fraction, the
    mean over ranks: rings send parts of a buffer.
    """

    w2s_bytes: int = 0
    s2w_bytes: int = 0
    received_bytes: int = 0
    wire_tx_bytes: int | Fraction = 0
    wire_rx_bytes: int | Fraction = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(add, self, other))

    def state(self) -> list[int]:
        """As whole numbers, for `from_state`."""
        return [number for count in self for number in Fraction(count).as_integer_ratio()]

    @classmethod
    def from_state(cls, numbers: list[int]) -> "Traffic":
        places = range(0, 2 * len(cls._fields), 2)
        counts = [Fraction(numbers[place], numbers[place + 1]) for place in places]
        return cls(*(int(one) if one.denominator == 1 else one for one in counts))


class Underway:
    """A round that has begun: a generator of its legs.

    It yields (send, batches, payloads) where messages travel: `send` starts to send them, and
    returns a function that waits for what arrives, which the generator is resumed with.
    """

    def __init__(self, legs: Generator, timer):
        self.legs, self.timer = legs, timer
        self.wait: Callable[[], Sequence] | None = None
        self.go_on()

    def go_on(self) -> bool:
        """Wait for what is under way and take the next leg; False at the end of the round."""
        arrived = None
        if self.wait:
            self.timer.phase("exchange")
            arrived = self.wait()
        try:
            send, batches, payloads = self.legs.send(arrived)
        except StopIteration:
            return False
        self.timer.phase("exchange")
        self.wait = send(batches, payloads)
        return True


def run(rounds: Iterable[Generator], timer) -> None:
    """Take rounds to their ends: all are under way before the first is waited for."""
    under_way = deque()
    for legs in rounds:
        under_way.append(Underway(legs, timer))
    while under_way:
        one = under_way.popleft()
        if one.go_on():
            under_way.append(one)


class Transport:
    """Messages of this rank to the servers of layers, and theirs back; `traffic` counts bytes.

    `heals`: whether a worker that has lost its way takes over what the others have, as in a fleet.
    `stream`: the number of this worker's random numbers, if not its rank.

    group: of the ranks that send to each other; without an initialised process group there is one,
    and nothing is sent. rank, ranks: of a transport that sends nothing and only counts, as for a
    plan; payloads may then be on the meta device.
    """

    heals = False
    stream: int | None = None

    def __init__(self, group: Group = None, rank: int | None = None, ranks: int | None = None):
        self.group, self.sends = group, ranks is None
        self.rank, self.ranks = place_in(group) if self.sends else (rank, ranks)
        self.traffic = Traffic()

    def require_options(self, *, server: str, **others) -> str:
        """The placement of servers. ValueError for options of LocalSteps that do not go with it."""
        return server

    def attach(self, optimizer) -> None:
        """The optimizer that sends by this; for transports that have to know it."""

    def to_servers(self, batches: Sequence, payloads: Sequence[Tensor]) -> Callable[[], list]:
        """Start to send every layer's payload to its owners (line 12 of Algorithm 1).

        payloads: for every batch uint8 (layers, batch.up.size). Returns a function that waits and
        gives for every batch the messages of all workers, uint8 (layers owned here, size) each.
        """
        size = sum(map(Tensor.numel, payloads))
        self.traffic += Traffic(w2s_bytes=size)
        if self.ranks == 1:
            return partial(list, zip(payloads))
        sizes = [batch.up.size for batch in batches]
        if all(batch.replicated for batch in batches):
            self.traffic += Traffic(received_bytes=(self.ranks - 1) * size)
            parts, arrive = self._to_all(packed(payloads))
        else:
            both = [*zip(batches, payloads, strict=True)]
            owners = range(self.ranks)
            messages = [packed([p[b.owned_by[owner]] for b, p in both]) for owner in owners]
            parts, arrive = self._swap(messages, [len(messages[self.rank])] * self.ranks)

        def receive() -> list[list[Tensor]]:
            arrive()
            of_workers = [_rows(part, batches, sizes, self.rank) for part in parts]
            return [list(of_batch) for of_batch in zip(*of_workers, strict=True)]

        return receive

    def to_workers(self, batches: Sequence, payloads: Sequence[Tensor]) -> Callable[[], Sequence]:
        """Start to send the payloads of the layers owned here to every rank (line 6).

        payloads: for every batch uint8 (layers owned here, batch.down.size). Returns a function
        that waits and gives for every batch (layers, size).
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
        parts, arrive = self._spread(packed(payloads), of_ranks)

        def receive() -> list[Tensor]:
            arrive()
            of_owners = [_rows(part, batches, sizes, rank) for rank, part in enumerate(parts)]
            return [torch.cat(of_batch) for of_batch in zip(*of_owners, strict=True)]

        return receive

    def again(self, send: Callable, batches: Sequence, payloads: Sequence[Tensor]) -> Callable:
        """Send what was under way at a checkpoint, and was counted before."""
        counted = self.traffic
        receive = send(batches, payloads)
        self.traffic = counted
        return receive

    def _to_all(self, message: Tensor) -> Incoming:
        """Start to gather the messages, of one size, of all ranks."""
        if self._from_host(message) or not self.sends:
            return self._swap([message] * self.ranks, [len(message)] * self.ranks)
        self._count_wire((self.ranks - 1) * len(message), (self.ranks - 1) * len(message))
        flat = message.new_empty(self.ranks * len(message))
        work = all_gather(flat, message, self.group, async_op=True)
        return list(flat.view(self.ranks, -1)), partial(wait, [work])

    def _spread(self, message: Tensor, sizes: list[int]) -> Incoming:
        """Start to send the message to all ranks, and to receive `sizes[r]` bytes from rank r.

        NCCL broadcasts it, once over every link; gloo sends it to one rank after another.
        """
        if not (self.sends and sends_by_nccl(self.group, message.device)):
            return self._swap([message] * self.ranks, sizes)
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

    def _swap(self, messages: Sequence[Tensor], sizes: Sequence[int]) -> Incoming:
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
        """Whether a thread sends it; then from rank to rank alone, by no collective of the group.

        Those are matched in the order of their calls, which other threads make too.
        """
        return self.sends and sends_from_host(self.group, message.device)

    def _count_wire(self, sent: int | Fraction, received: int | Fraction) -> None:
        self.traffic += Traffic(wire_tx_bytes=sent, wire_rx_bytes=received)


def packed(payloads: Iterable[Tensor]) -> Tensor:
    """One message, (bytes,)."""
    return torch.cat([payload.flatten() for payload in payloads])


def _rows(part: Tensor, batches: Sequence, sizes: Sequence[int], owner: int) -> list[Tensor]:
    """Split what `owner` owns, (bytes,), into (layers, size) per batch."""
    parts = part.split(_lengths(batches, sizes, owner))
    return [one.view(-1, size) for one, size in zip(parts, sizes, strict=True)]


def _lengths(batches: Sequence, sizes: Sequence[int], owner: int) -> list[int]:
    """The bytes of what `owner` owns of each batch, by the size of a layer."""
    owned = (len(batch.params[batch.owned_by[owner]]) for batch in batches)
    return [layers * size for layers, size in zip(owned, sizes, strict=True)]
