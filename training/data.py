"""The data of a run, and its workers' shares of a batch."""

from collections.abc import Iterable, Iterator

import torch
from omegaconf import DictConfig

from data.loader import Prefetched, TestWindows, TokenStream, WorkerBatches, open_streams
from training.config import ROOT
from training.fleet import place_among_all
from training.workers import RunError, Workers


class Feed:
    """What a run reads on this worker, on its device: training batches and the test windows.

    `batches` has the state of what comes next, `streams` all tokens. Raises RunError, ShardError or
    ValueError for data or a batch that do not suffice for the workers.
    """

    def __init__(self, config: DictConfig, context: int, workers: Workers):
        self.workers, self.together = workers, config.fsdp
        rank, count = place_among_all(config, workers)
        self.sequences = share_of_batch(config, count)  # of a forward pass
        self.passes = config.batch.global_size // count // self.sequences
        train_tokens, test_tokens = open_data(config)
        self.streams = {"training": train_tokens, "test": test_tokens}
        batches = WorkerBatches(train_tokens, context, rank, count, config.seed)
        self.on_cuda = workers.device.type == "cuda"
        self.batches = Prefetched(batches) if self.on_cuda else batches
        self.windows = TestWindows(test_tokens, context, config.eval.tokens)

    def next(self) -> list[list[torch.Tensor]]:
        """Inputs and targets of this worker's forward passes of one step, of equal size."""
        return [self._to_device(self.batches.next(self.sequences)) for _ in range(self.passes)]

    def test(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Of this worker's share of the test windows inputs, targets and how many tokens count."""
        place = self.workers.rank, self.workers.count
        for *batch, counted in self.windows.batches(*place, self.sequences, self.together):
            yield *self._to_device(batch), counted

    def _to_device(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        if self.on_cuda:  # else the copy would wait for the device
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.workers.device, non_blocking=True) for tensor in tensors]


def open_data(config: DictConfig) -> tuple[TokenStream, TokenStream]:
    """The training and the test tokens that the configuration names."""
    options = {key: value for key, value in config.data.items() if key != "name"}
    return open_streams(**options, root=ROOT)


def share_of_batch(config: DictConfig, workers: int) -> int:
    """Sequences in one forward pass of a worker. Raises RunError if the workers do not divide."""
    if config.batch.global_size % workers:
        raise RunError(
            f"batch.global_size={config.batch.global_size} cannot be split over {workers} workers: "
            f"give a multiple of {workers}"
        )
    own = config.batch.global_size // workers
    return max(n for n in range(1, min(own, config.batch.micro_size) + 1) if own % n == 0)
