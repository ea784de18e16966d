"""Sends a GPU's messages from the host, through pinned memory, while the GPU computes.

Over slow links messages are small and travel by TCP, which sends from the host's memory. As soon as
a message is encoded, it is copied there on a stream of its own. A thread waits for the copy and
hands it to the process group; meanwhile the next message is encoded.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

# Starts to send the first tensors and to receive into the others.
Send = Callable[[Sequence[Tensor], Sequence[Tensor]], list[dist.Work]]


def sends_from_host(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether a tensor has to be copied to the host first: it is on CUDA, and the group is gloo's.

    torch lets gloo reduce and gather CUDA tensors, where the step waits for the copy, but not send
    them from rank to rank.
    """
    return device.type == "cuda" and "cuda:gloo" in dist.get_backend_config(group)


def sends_by_nccl(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether NCCL sends tensors of the device, by kernels that wait on the device."""
    return device.type == "cuda" and "cuda:nccl" in dist.get_backend_config(group)


def require_host(group: dist.ProcessGroup | None, device: torch.device, given: str) -> None:
    """Check that messages can travel while the device computes, which NCCL's cannot.

    Args:
        group: the ranks that send to each other.
        device: that of the messages.
        given: the option that asks for it, for the error, such as "sync_delay=2".

    Raises:
        ValueError: if NCCL sends the messages.
    """
    if sends_by_nccl(group, device):
        raise ValueError(
            f"{given} is not allowed with NCCL, whose kernels would hold the GPU until messages "
            "come: give a process group of gloo, which sends from the host"
        )


def wait(works: Iterable[dist.Work]) -> None:
    """Wait for all transfers.

    Raises:
        RuntimeError: torch's, with a note on what to do, where another rank is gone.
    """
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        error.add_note(
            "another rank has ended, or failed first, while this one waited for its message: look "
            "at its error, or give every rank as many steps (batches)"
        )
        raise


def start_from_host(
    send: Send, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]
) -> Callable[[], None]:
    """Start to send tensors from the host, in the order of calls of this function.

    Args:
        send: called by the thread with the copies of `outgoing` and with buffers for `incoming`.
        outgoing: tensors to send, on one device; one that stands in it twice is copied once.
        incoming: tensors to fill with what is received.

    Returns:
        A function that waits for the transfers and starts to copy what has arrived to `incoming`.
    """
    copies, wait_for_copies = _copied({id(tensor): tensor for tensor in outgoing})
    arriving = [*map(_on_host, incoming)]

    def hand_over() -> list[dist.Work]:
        wait_for_copies()
        return send([copies[id(tensor)] for tensor in outgoing], arriving)

    works = sender().submit(hand_over)

    def arrive() -> None:
        wait(works.result())
        for buffer, arrived in zip(incoming, arriving, strict=True):
            buffer.copy_(arrived, non_blocking=True)

    return arrive


@cache
def sender() -> ThreadPoolExecutor:
    """The thread that sends: one per process, so that all ranks send in the same order."""
    return ThreadPoolExecutor(1, "ef21_muon messages")


_stream = cache(torch.cuda.Stream)  # by device


def _on_host(tensor: Tensor) -> Tensor:
    """A buffer on the host; torch's allocator of pinned memory keeps it for the next one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _copied(tensors: dict[int, Tensor]) -> tuple[dict[int, Tensor], Callable[[], None]]:
    """Copies on the host, and a function that waits until they are there."""
    device = next(iter(tensors.values())).device
    if device.type == "cpu":
        return {key: tensor.clone() for key, tensor in tensors.items()}, lambda: None
    copies = {key: _on_host(tensor) for key, tensor in tensors.items()}
    stream, done = _stream(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for key, tensor in tensors.items():
            copies[key].copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        done.record()
    return copies, done.synchronize
