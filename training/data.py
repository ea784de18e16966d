"""The data of a run, and each worker's share of a batch."""

from collections.abc import Iterable, Iterator

import torch
from omegaconf import DictConfig

from data.loader import Prefetched, TestWindows, TokenStream, WorkerBatches, open_streams
from training.config import ROOT
from training.fleet import place_among_all
from training.workers import RunError, Workers


class BatchSource:
    """The training batches and test windows of this worker, on its device.

    `batches` holds the position in the training tokens, `streams` all tokens. Raises RunError,
    ShardError or ValueError if the data or the batch are too small for the workers.
    """

    def __init__(self, config: DictConfig, context: int, workers: Workers):
        self.workers, self.together = workers, config.fsdp
        rank, count = place_among_all(config, workers)
        self.sequences = share_of_batch(config, count)  # in one forward pass
        self.forward_passes = config.batch.global_size // count // self.sequences
        train_tokens, test_tokens = open_data(config)
        self.streams = {"training": train_tokens, "test": test_tokens}
        batches = WorkerBatches(train_tokens, context, rank, count, config.seed)
        self.on_cuda = workers.device.type == "cuda"
        self.batches = Prefetched(batches) if self.on_cuda else batches
        self.windows = TestWindows(test_tokens, context, config.eval.tokens)

    def next_batch(self) -> list[list[torch.Tensor]]:
        """Inputs and targets of each forward pass of the next step; all have equal size."""
        return [
            self._to_device(self.batches.next(self.sequences)) for _ in range(self.forward_passes)
        ]

    def test_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """This worker's test windows: inputs, targets, and how many of their tokens count."""
        place = self.workers.rank, self.workers.count
        for *batch, counted in self.windows.batches(*place, self.sequences, self.together):
            yield *self._to_device(batch), counted

    def _to_device(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        if self.on_cuda:  # a copy from memory that is not pinned would wait for the device
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.workers.device, non_blocking=True) for tensor in tensors]


def open_data(config: DictConfig) -> tuple[TokenStream, TokenStream]:
    """The training and the test tokens that the configuration names."""
    options = {key: value for key, value in config.data.items() if key != "name"}
    return open_streams(**options, root=ROOT)


def share_of_batch(config: DictConfig, workers: int) -> int:
    """The number of sequences in one forward pass of a worker.

    Raises RunError if the batch cannot be split evenly over the workers.
    """
    if config.batch.global_size % workers:
        raise RunError(
            f"batch.global_size={config.batch.global_size} cannot be split over {workers} workers: "
            f"give a multiple of {workers}"
        )
    own = config.batch.global_size // workers
    return max(n for n in range(1, min(own, config.batch.micro_size) + 1) if own % n == 0)
