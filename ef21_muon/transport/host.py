"""Messages of a GPU that a network of hosts carries: through pinned memory, while the GPU goes on.

Over slow links messages are small and travel by TCP, which sends from the host's memory. A copy
goes there on a stream of its own as soon as the message is encoded; a thread waits for it and hands
it to the process group, so that meanwhile the next message is encoded.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

# Starts to send the first tensors and to receive the others.
Send = Callable[[Sequence[Tensor], Sequence[Tensor]], list[dist.Work]]


def sends_from_host(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether tensors of the device cannot be sent as they are: they are CUDA's, the group gloo's.

    torch lets gloo reduce and gather CUDA tensors, but not send them from rank to rank, and makes
    the step wait for the copy.
    """
    return device.type == "cuda" and "cuda:gloo" in dist.get_backend_config(group)


def sends_by_nccl(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether NCCL sends tensors of the device: by kernels of its own, which wait on the device."""
    return device.type == "cuda" and "cuda:nccl" in dist.get_backend_config(group)


def require_host(group: dist.ProcessGroup | None, device: torch.device, given: str) -> None:
    """Raise ValueError for messages that travel while the device computes, and by NCCL."""
    if sends_by_nccl(group, device):
        raise ValueError(
            f"{given} is not allowed with NCCL, whose kernels would hold the GPU until messages "
            "come: give a process group of gloo, which sends from the host"
        )


def start_from_host(
    send: Send, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]
) -> tuple[Callable[[], list[dist.Work]], Callable[[], None]]:
    """Start to send `outgoing` from the host, in the order of calls; a tensor is copied once.

    Returns a function that gives the works to wait for, and one that then starts the copies of what
    has arrived to `incoming`.
    """
    own, wait_for_copies = _copied(list({id(tensor): tensor for tensor in outgoing}.values()))
    copies = [own[id(tensor)] for tensor in outgoing]
    arriving = [_on_host(buffer) for buffer in incoming]

    def hand_over() -> list[dist.Work]:
        wait_for_copies()
        return send(copies, arriving)

    works = sender().submit(hand_over)

    def take_up() -> None:
        for buffer, arrived in zip(incoming, arriving, strict=True):
            buffer.copy_(arrived, non_blocking=True)

    return works.result, take_up


@cache
def sender() -> ThreadPoolExecutor:
    """One thread of the process, so that all ranks hand over in the same order."""
    return ThreadPoolExecutor(1, "ef21_muon messages")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _on_host(tensor: Tensor) -> Tensor:
    """Room for a copy, which torch's allocator of pinned memory keeps for the next one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _copied(tensors: Sequence[Tensor]) -> tuple[dict[int, Tensor], Callable[[], None]]:
    """Copies on the host by the tensor's id, and what waits until they are there."""
    copies = {id(tensor): _on_host(tensor) for tensor in tensors}
    if not any(tensor.is_cuda for tensor in tensors):
        for tensor in tensors:
            copies[id(tensor)].copy_(tensor)
        return copies, lambda: None
    device = tensors[0].device
    stream, done = _stream(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for tensor in tensors:
            copies[id(tensor)].copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        done.record()
    return copies, done.synchronize
