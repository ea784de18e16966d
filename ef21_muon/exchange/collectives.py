"""The collectives of a round, and the bytes that they take.

Every layer has owners, the ranks that play the server for it. All messages are uint8 buffers, one
each way for a bucket of batches and a pair of ranks: from workers to servers (w2s) and back (s2w).
All sizes follow from shapes, so no sizes travel. A message to oneself never leaves the rank.

Between pairs they go as one batch of sends and receives: gloo's `all_to_all_single` uses a link in
one direction at a time (20 MB each way between two nodes at 100 Mbit/s: 3.1 s, and 1.6 s so).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ef21_muon.exchange.host import sends_from_host, start_from_host

# Given for a process group, a worker is alone though others run: nothing is sent.
ALONE = "alone"
# Its name from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def place_in(group: dist.ProcessGroup | str | None) -> tuple[int, int]:
    """This process's rank in the group and the group's size; alone without a process group."""
    if group is ALONE or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def wait(works: list[dist.Work]) -> None:
    """Wait for all; what torch raises where another rank is gone says so too."""
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        error.add_note(
            "another rank has ended, or failed first, while this one waited for its message in a "
            "step: look at its error, or give every rank as many steps (batches)"
        )
        raise


@dataclass(frozen=True)
class Traffic:
    """Bytes: of a worker to the servers and back, what it receives, and what this rank sends.

    What a worker receives is what comes back from the servers, or the messages of the others where
    every worker serves. What a rank hands to the network may be a fraction, the mean over ranks:
    rings send parts of a buffer.
    """

    w2s_bytes: int = 0
    s2w_bytes: int = 0
    received_bytes: int = 0
    wire_tx_bytes: int | Fraction = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.w2s_bytes + other.w2s_bytes,
            self.s2w_bytes + other.s2w_bytes,
            self.received_bytes + other.received_bytes,
            self.wire_tx_bytes + other.wire_tx_bytes,
        )

    def state(self) -> list[int]:
        """As whole numbers, for `from_state`."""
        ratio = self.wire_tx_bytes.as_integer_ratio()
        return [self.w2s_bytes, self.s2w_bytes, self.received_bytes, *ratio]

    @classmethod
    def from_state(cls, numbers: list[int]) -> "Traffic":
        *counts, numerator, denominator = numbers
        return cls(*counts, Fraction(numerator, denominator))


class Exchange:
    """The collectives of one round, for batches of layers with fixed payload sizes.

    owned[b][r]: the layers of batch b that rank r owns; w2s_sizes[b], s2w_sizes[b]: payload bytes
    of one layer of batch b in either direction. Without an initialised process group there is one
    rank, and nothing is sent. Where every rank owns every layer, nothing is sent back.
    """

    def __init__(
        self,
        owned: list[list[slice]],
        w2s_sizes: list[int],
        s2w_sizes: list[int],
        group: dist.ProcessGroup | None = None,
    ):
        self.group = group
        self.rank, self.ranks = place_in(group)
        self.owned, self.w2s_sizes, self.s2w_sizes = owned, w2s_sizes, s2w_sizes
        every = range(len(owned))
        self.replicated = all(part == slice(0, self._layers(b)) for b in every for part in owned[b])
        # Of one worker's message to the servers, of the servers' message to every worker, and of
        # all that a worker receives.
        both = self.traffic_to_servers(every) + self.traffic_to_workers(every)
        self.w2s_bytes, self.s2w_bytes = both.w2s_bytes, both.s2w_bytes
        self.received_bytes = both.received_bytes

    def traffic(self) -> Traffic:
        """What one round takes."""
        counts = self.w2s_bytes, self.s2w_bytes, self.received_bytes
        return Traffic(*counts, self.wire_tx_bytes(self.rank))

    def wire_tx_bytes(self, rank: int) -> int:
        """Bytes that a rank hands to the network in one round."""
        every = range(len(self.owned))
        return self._wire_to_servers(rank, every) + self._wire_to_workers(rank, every)

    def traffic_to_servers(self, bucket: range) -> Traffic:
        """What the messages of a bucket of batches take."""
        w2s = sum(self._layers(b) * self.w2s_sizes[b] for b in bucket)
        received = (self.ranks - 1) * w2s if self.replicated else 0
        return Traffic(w2s, 0, received, self._wire_to_servers(self.rank, bucket))

    def traffic_to_workers(self, bucket: range) -> Traffic:
        """What the messages back take."""
        nothing = self.replicated and self.ranks > 1
        s2w = 0 if nothing else sum(self._layers(b) * self.s2w_sizes[b] for b in bucket)
        return Traffic(0, s2w, s2w, self._wire_to_workers(self.rank, bucket))

    def _wire_to_servers(self, rank: int, bucket: range) -> int:
        others = (other for other in range(self.ranks) if other != rank)
        return sum(sum(self._lengths(self.w2s_sizes, other, bucket)) for other in others)

    def _wire_to_workers(self, rank: int, bucket: range) -> int:
        if self.replicated:
            return 0
        return (self.ranks - 1) * sum(self._lengths(self.s2w_sizes, rank, bucket))

    def _layers(self, b: int) -> int:
        return max(part.stop for part in self.owned[b])

    def to_servers(self, payloads: list[Tensor], bucket: range) -> Callable[[], list]:
        """Start to send every layer's payload to its owners.

        payloads: for every batch of the bucket uint8 (layers, w2s size). Returns a function that
        waits and gives for every batch of the bucket, of each worker, (layers owned here, w2s
        size).
        """
        if self.ranks == 1:
            return lambda: [(payload,) for payload in payloads]
        receivers = [self.rank] if self.replicated else range(self.ranks)
        messages = [
            torch.cat(
                [p[self.owned[b][rank]].flatten() for b, p in zip(bucket, payloads, strict=True)]
            )
            for rank in receivers
        ]
        mine = sum(self._lengths(self.w2s_sizes, self.rank, bucket))
        if self.replicated and not self._from_host(messages[0]):
            flat = messages[0].new_empty(self.ranks * mine)
            work = all_gather(flat, messages[0], self.group, async_op=True)
            received, arrive = list(flat.view(self.ranks, mine)), partial(wait, [work])
        else:
            messages = messages * self.ranks if self.replicated else messages
            received, arrive = self._swap(messages, [mine] * self.ranks)

        def receive() -> list[tuple[Tensor, ...]]:
            arrive()
            of_workers = [
                self._rows(part[None], self.w2s_sizes, self.rank, bucket) for part in received
            ]
            return [tuple(r[0] for r in rows) for rows in zip(*of_workers, strict=True)]

        return receive

    def to_workers(self, payloads: list[Tensor], bucket: range) -> Callable[[], list[Tensor]]:
        """Start to send the payloads of the layers owned here to every rank.

        payloads: for every batch of the bucket uint8 (layers owned here, s2w size). Returns a
        function that waits and gives for every batch of the bucket (layers, s2w size).
        """
        if self.replicated:
            return lambda: payloads
        message = torch.cat([payload.flatten() for payload in payloads])
        sizes = [sum(self._lengths(self.s2w_sizes, rank, bucket)) for rank in range(self.ranks)]
        received, arrive = self._swap([message] * self.ranks, sizes)

        def receive() -> list[Tensor]:
            arrive()
            by_owner = [
                self._rows(part[None], self.s2w_sizes, rank, bucket)
                for rank, part in enumerate(received)
            ]
            return [torch.cat([rows[0] for rows in batch]) for batch in zip(*by_owner, strict=True)]

        return receive

    def _swap(
        self, messages: list[Tensor], sizes: list[int]
    ) -> tuple[list[Tensor], Callable[[], None]]:
        """Start to send message r to rank r of the group, and to receive `sizes[r]` bytes from it.

        Returns what is received of each rank, and what waits until it is there.
        """
        received = [messages[0].new_empty(size) for size in sizes]
        received[self.rank] = messages[self.rank]
        others = [rank for rank in range(self.ranks) if rank != self.rank]

        def send(outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[dist.Work]:
            transfers = [
                dist.P2POp(operation, tensor, group=self.group, group_peer=rank)
                for rank, *both in zip(others, outgoing, incoming, strict=True)
                for operation, tensor in zip((dist.isend, dist.irecv), both, strict=True)
                if len(tensor)
            ]
            return dist.batch_isend_irecv(transfers) if transfers else []

        outgoing, incoming = (
            [tensors[rank] for rank in others] for tensors in (messages, received)
        )
        if not self._from_host(messages[0]):
            return received, partial(wait, send(outgoing, incoming))
        works_of, take_up = start_from_host(send, outgoing, incoming)

        def arrive() -> None:
            wait(works_of())
            take_up()

        return received, arrive

    def _from_host(self, message: Tensor) -> bool:
        """Whether a thread sends it; then from rank to rank alone, by no collective of the group.

        Those are matched in the order of their calls, which other threads make too.
        """
        return sends_from_host(self.group, message.device)

    def _lengths(self, sizes: list[int], rank: int, bucket: range) -> list[int]:
        """Bytes of what `rank` owns of each batch of the bucket."""
        owned = [self.owned[b][rank] for b in bucket]
        return [(o.stop - o.start) * sizes[b] for o, b in zip(owned, bucket, strict=True)]

    def _rows(self, received: Tensor, sizes: list[int], owner: int, bucket: range) -> list[Tensor]:
        """Split what `owner` owns, (senders, bytes), into (senders, layers, size) per batch."""
        parts = received.split(self._lengths(sizes, owner, bucket), 1)
        return [part.unflatten(1, (-1, sizes[b])) for part, b in zip(parts, bucket, strict=True)]
