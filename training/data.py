"""The data of a run, and its workers' shares of a batch."""

from omegaconf import DictConfig

from data.loader import TokenStream, open_streams
from training.config import ROOT
from training.workers import RunError


def open_data(config: DictConfig) -> tuple[TokenStream, TokenStream]:
    """The training and the test tokens that the configuration names."""
    options = {key: value for key, value in config.data.items() if key != "name"}
    return open_streams(**options, root=ROOT)


def share_of_batch(config: DictConfig, workers: int) -> int:
    """Sequences in one forward pass of a worker. Raises RunError if the workers do not divide."""
    if config.batch.sequences % workers:
        raise RunError(
            f"batch.sequences={config.batch.sequences} cannot be split over {workers} workers: "
            f"give a multiple of {workers}"
        )
    own = config.batch.sequences // workers
    return max(n for n in range(1, min(own, config.batch.per_forward) + 1) if own % n == 0)
