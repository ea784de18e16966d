"""Workers of several ranks: gradients whole inside a node, compressed messages between nodes.

Ranks j G to j G + G - 1 are worker j. Every layer has a lane, one of the G ranks of each worker:
that rank gets the mean of its worker's gradients, holds M_j and G_j of the layer, and takes part in
Algorithm 1 with the ranks of its lane in the other workers. So encoding, server work and traffic
between nodes are spread over the ranks of a node, and nothing crosses twice.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from ef21_muon.exchange import spread
from ef21_muon.optimizer import EF21Muon


class HierarchicalEF21Muon(EF21Muon):
    """EF21Muon in which `worker_size` successive ranks are one worker.

    groups: parameter groups of (name, parameter) pairs, alike on all ranks, with entries and other
    options as in EF21Muon. A rank's own `param_groups` hold the layers of its lane alone, and
    `worker_groups` those of all; `step` drops the gradients of the others. `w2s_bytes` and
    `s2w_bytes` are of the whole worker, `wire_tx_bytes` what this rank sends to other workers. To
    wait longer than `timeout`, by default torch's, for another rank is an error. Raises ValueError,
    on all ranks of a worker, where one of them cannot build its part, where `worker_size` does not
    divide the ranks or leaves one without a layer, and without a process group.
    """

    def __init__(
        self, groups: list[dict], *, worker_size: int, timeout: timedelta | None = None, **options
    ):
        if not dist.is_initialized():
            raise ValueError(f"worker_size={worker_size} needs a process group: use torchrun")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if worker_size < 1 or ranks % worker_size:
            raise ValueError(
                f"worker_size={worker_size} does not divide {ranks} ranks: give a divisor"
            )
        pairs = [pair for group in groups for pair in group["params"]]
        if len(pairs) < worker_size:
            raise ValueError(
                f"worker_size={worker_size} leaves ranks without a layer: the model has "
                f"{len(pairs)}, give at most as many"
            )
        lanes = spread([parameter.numel() for _, parameter in pairs], worker_size)
        worker, lane = divmod(rank, worker_size)
        first = worker * worker_size
        self.worker_size = worker_size
        self.worker = _group(range(first, first + worker_size), timeout)
        # Every parameter with the rank of this worker that holds its state.
        self.holders = [
            (parameter, first + of) for (_, parameter), of in zip(pairs, lanes, strict=True)
        ]
        own = {parameter for parameter, holder in self.holders if holder == rank}
        mine = [
            {**group, "params": [pair for pair in group["params"] if pair[1] in own]}
            for group in groups
        ]
        self.worker_groups = groups
        refused = None
        try:
            super().__init__(
                [group for group in mine if group["params"]],
                process_group=_group(range(lane, ranks, worker_size), timeout),
                **options,
            )
        except ValueError as error:
            refused = error
        self._agree(refused)
        for exchange in (phase.exchange for phase in self.phases):
            sizes = torch.tensor([exchange.w2s_bytes, exchange.s2w_bytes], device=self._device)
            dist.all_reduce(sizes, group=self.worker)
            exchange.w2s_bytes, exchange.s2w_bytes = sizes.tolist()

    def _agree(self, refused: ValueError | None) -> None:
        """Raise ValueError on all ranks of the worker where one refuses its layers."""
        device = self.holders[0][0].device
        refusals = torch.tensor(int(refused is not None), device=device)
        dist.all_reduce(refusals, group=self.worker)
        if refused:
            raise refused
        if refusals:
            raise ValueError("another rank of this worker has refused its layers: see its error")

    def _begins(self, rules: list) -> set[int]:
        of_all_lanes = [group["w2s"] for group in self.worker_groups if "w2s" in group]
        return super()._begins([*rules, *of_all_lanes])  # lanes sum up what they send in a phase

    @torch.no_grad()
    def step(self, closure=None):
        """Average gradients inside the worker, take a round between workers, share the result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self.timer("exchange"):
            self._reduce_gradients()
        super().step()
        with self.timer("exchange"):
            self._share_parameters()
        return loss

    def _reduce_gradients(self) -> None:
        """The mean of the worker's gradients, on the rank that holds a layer."""
        works = [
            dist.reduce(parameter.grad, holder, group=self.worker, async_op=True)
            for parameter, holder in self.holders
        ]
        for work in works:
            work.wait()
        own = {p for group in self.param_groups for p in group["params"]}
        for parameter, _ in self.holders:
            if parameter not in own:
                parameter.grad = None
        torch._foreach_div_([parameter.grad for parameter in own], self.worker_size)

    def _share_parameters(self) -> None:
        works = [
            dist.broadcast(parameter.detach(), holder, group=self.worker, async_op=True)
            for parameter, holder in self.holders
        ]
        for work in works:
            work.wait()


def _group(ranks: range, timeout: timedelta | None) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), timeout, use_local_synchronization=True)
