"""A round of workers that come and go: what each says before its message, and what it was."""

from dataclasses import dataclass
from struct import Struct

import torch
from torch import Tensor

from ef21_muon.exchange.collectives import Traffic

# Before a message: the messages in W so far, a digest of what all workers share, the steps that the
# message was made after, whether it counts, and whether what it was made of is finite.
HEAD = Struct(">Q8sQ??")
HISTORY = 16  # bytes, of the first two


@dataclass(frozen=True)
class Meeting:
    """Of a round of workers.

    messages: how many count; step: up to which they tell, None without one; workers: the
    numbers of those that met; healed: whether this one took over what the others share; parted: how
    often it found that it had another history than others; apart: whether of as many messages;
    history: in hexadecimal, how many messages there were before and the digest of what all shared;
    tries: quorums that it took; seconds: of waiting and sending; traffic: bytes of all tries;
    refused: the numbers of those whose messages were not finite and do not count; notes: what was
    amiss, in words.
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
    refused: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def history_of(heads: list[bytes]) -> bytes:
    """The one that goes on: of a worker that is finite, of most messages, then of most workers."""
    histories = [head[:HISTORY] for head in heads]
    finite = {head[:HISTORY] for head in heads if HEAD.unpack(head)[-1]}
    return max(histories, key=lambda one: (one in finite, one[:8], histories.count(one), one))


def bytes_of(head: bytes) -> Tensor:
    """A head as (bytes,) uint8."""
    return torch.frombuffer(bytearray(head), dtype=torch.uint8)
