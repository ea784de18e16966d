"""EF21-Muon with workers of several ranks: whole gradients inside, compressed messages between."""

from datetime import timedelta

from ef21_muon.exchange.collectives import Traffic
from ef21_muon.exchange.lanes import Lanes
from ef21_muon.optimizer import EF21Muon


class HierarchicalEF21Muon(EF21Muon):
    """EF21Muon in which `worker_size` successive ranks are one worker (`ef21_muon.exchange.lanes`).

    groups: parameter groups of (name, parameter) pairs, alike on all ranks, with entries and other
    options as in EF21Muon. Parameters are whole, or sharded over the ranks of a worker by torch's
    `fully_shard`, whose root is to be resharded after every forward pass. A rank's own
    `param_groups` hold the layers of its lane alone, and `worker_groups` those of all; `step` drops
    the gradients of the others, or of shards all. `w2s_bytes`, `s2w_bytes` and `received_bytes` are
    of the whole worker, `wire_tx_bytes` what this rank sends to others. To wait longer than
    `timeout`, by default torch's, for another rank is an error. `backend` is that of messages
    between workers, by default torch's. Raises ValueError, on all ranks of a worker, where one of
    them cannot build its part, where `worker_size` does not divide the ranks or leaves one without
    a layer, for shards of another mesh than that of the worker's ranks, and without a process
    group.
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        worker_size: int,
        timeout: timedelta | None = None,
        backend: str | None = None,
        **options,
    ):
        if options.get("momentum", "polyak") != "polyak":
            raise ValueError(
                f"momentum={options['momentum']!r} is not allowed with workers of several ranks, "
                "of which each has a part of W: leave it at 'polyak', or use worker_size=1"
            )
        parameters = [parameter for group in groups for _, parameter in group["params"]]
        self.lanes = Lanes(parameters, worker_size, timeout, backend)
        self.worker_groups = groups
        with self.lanes.together():
            super().__init__(
                self.lanes.of_lane(groups),
                process_group=self.lanes.lane,
                **options,
            )
        self.lanes.name(self._layers)
        for exchange in (phase.exchange for phase in self.phases):
            exchange.w2s_bytes, exchange.s2w_bytes, exchange.received_bytes = self.lanes.total(
                exchange.w2s_bytes, exchange.s2w_bytes, exchange.received_bytes
            )

    @property
    def worker_size(self) -> int:
        """The ranks of a worker."""
        return self.lanes.worker_size

    def _begins(self, rules: list) -> set[int]:
        of_all_lanes = [group["w2s"] for group in self.worker_groups if "w2s" in group]
        return super()._begins([*rules, *of_all_lanes])  # lanes sum up what they send in a phase

    def _round(self) -> Traffic:
        """Average gradients inside the worker, take a round between workers, share the result."""
        with self.timer("exchange"):
            self.lanes.reduce_gradients()
        traffic = super()._round()
        with self.timer("exchange"):
            self.lanes.share_parameters()
        return traffic
