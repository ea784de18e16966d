"""Workers of several ranks: which rank of a worker holds the state of which layer.

Ranks j G to j G + G - 1 are worker j. Every layer has a lane, one of the G ranks of each worker:
that rank gets the mean of its worker's gradients and takes part in rounds with the ranks of its
lane in the other workers. So encoding, server work and traffic between workers are spread over the
ranks of a worker, and nothing crosses twice.
"""

from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ef21_muon.exchange.clipping import clip
from ef21_muon.exchange.gradients import Layer
from ef21_muon.exchange.placement import spread
from ef21_muon.exchange.shards import Shards, is_sharded


class Lanes:
    """This rank's place among the `worker_size` ranks of its worker, and the lane of every layer.

    parameters: of all layers, in the same order on all ranks, whole or all of them sharded over the
    ranks of the worker by torch's `fully_shard`. `worker` is the process group of this
    worker, `lane` that of the ranks which hold the same layers in all workers, `holders` every
    parameter with the rank of this worker that holds it, `own` those of this rank with what an
    optimizer steps of them: itself, or a whole copy. `layers` has of all what an optimizer needs to
    ask for gradients (`ef21_muon.exchange.gradients`), once they were named. To wait longer
    than `timeout`, by default torch's, for another rank is an error. `backend` is that of `lane`:
    by default torch's; with "gloo" messages go through the host's memory. `max_norm`, to be set
    alike on all ranks, clips the worker's gradient in every step. Raises ValueError where
    `worker_size` does not divide the ranks or leaves one without a layer, and without a process
    group.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        worker_size: int,
        timeout: timedelta | None,
        backend: str | None = None,
    ):
        if not dist.is_initialized():
            raise ValueError(f"worker_size={worker_size} needs a process group: use torchrun")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if worker_size < 1 or ranks % worker_size:
            raise ValueError(
                f"worker_size={worker_size} does not divide {ranks} ranks: give a divisor"
            )
        if len(parameters) < worker_size:
            raise ValueError(
                f"worker_size={worker_size} leaves ranks without a layer: the model has "
                f"{len(parameters)}, give at most as many"
            )
        self.max_norm: float | None = None  # of the worker's gradient, of all layers together
        worker, place = divmod(rank, worker_size)
        first = worker * worker_size
        self.worker_size = worker_size
        self.worker = _group(range(first, first + worker_size), timeout)
        self.lane = _group(range(place, ranks, worker_size), timeout, backend)
        of_layers = spread([parameter.numel() for parameter in parameters], worker_size)
        self.holders = [
            (parameter, first + lane) for parameter, lane in zip(parameters, of_layers, strict=True)
        ]
        self.shards = None
        self.own = {p: p for p, holder in self.holders if holder == rank}
        if any(map(is_sharded, parameters)):
            self.shards = self._shards(list(range(first, first + worker_size)))
            self.own = self.shards.whole
        self.layers = [
            Layer(f"a parameter of shape {tuple(p.shape)}", p, p.numel(), "refuse")
            for p in parameters
        ]

    def name(self, own: list[Layer]) -> None:
        """Tell all ranks of the worker of the layers that an optimizer of this lane steps."""
        places = {
            id(self.own[p]): place for place, (p, _) in enumerate(self.holders) if p in self.own
        }
        mine = {places[id(one.parameter)]: (one.name, one.missing) for one in own}
        of_ranks = [None] * self.worker_size
        dist.all_gather_object(of_ranks, mine, group=self.worker)
        for place, (name, missing) in (pair for of_rank in of_ranks for pair in of_rank.items()):
            self.layers[place] = self.layers[place]._replace(name=name, missing=missing)

    def _shards(self, ranks: list[int]) -> Shards:
        for parameter, _ in self.holders:
            if not is_sharded(parameter):
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is whole where others are "
                    "sharded: call fully_shard for the whole model, too"
                )
        return Shards(self.holders, ranks, self.worker)

    def of_lane(self, groups: list[dict]) -> list[dict]:
        """Of parameter groups of (name, parameter) pairs the part of this rank's lane.

        With what is stepped of each parameter; groups of which it has none are left out.
        """
        own = [
            {**group, "params": [(n, self.own[p]) for n, p in group["params"] if p in self.own]}
            for group in groups
        ]
        return [group for group in own if group["params"]]

    @contextmanager
    def together(self):
        """Within it an error of one rank of the worker is raised on all of them.

        On the others as ValueError with the same message. Not for what waits for other ranks of the
        worker itself.
        """
        refused = None
        try:
            yield
        except Exception as error:
            refused = error
        messages = [None] * self.worker_size
        dist.all_gather_object(messages, refused and str(refused), group=self.worker)
        if refused is not None:
            raise refused
        for message in messages:
            if message is not None:
                raise ValueError(message)

    def total(self, *numbers: int) -> list[int]:
        """The sums of the numbers over the ranks of the worker."""
        sums = torch.tensor(numbers, device=self.holders[0][0].device)
        dist.all_reduce(sums, group=self.worker)
        return sums.tolist()

    def reduce_gradients(self) -> None:
        """The mean of the worker's gradients, on the rank that holds a layer; elsewhere none.

        Clipped to `max_norm`, where there is one. All ranks of the worker have brought those of all
        `layers`.
        """
        if self.shards:
            self.shards.gather_parameters()
            self.shards.gather_gradients()
        else:
            self._average_gradients()
        if self.max_norm is not None:
            clip([one.grad for one in self.own.values()], self.max_norm, self.worker)

    def _average_gradients(self) -> None:
        works = [
            dist.reduce(parameter.grad, holder, group=self.worker, async_op=True)
            for parameter, holder in self.holders
        ]
        for work in works:
            work.wait()
        for parameter, _ in self.holders:
            if parameter not in self.own:
                parameter.grad = None
        torch._foreach_div_([parameter.grad for parameter in self.own], self.worker_size)

    def gather_parameters(self) -> None:
        """What this rank steps of sharded layers, as the shards are."""
        if self.shards:
            self.shards.gather_parameters()

    def share_parameters(self) -> None:
        """Every layer as the rank that holds it has it."""
        if self.shards:
            self.shards.scatter_parameters()
            return
        works = [
            dist.broadcast(parameter.detach(), holder, group=self.worker, async_op=True)
            for parameter, holder in self.holders
        ]
        for work in works:
            work.wait()


def _group(
    ranks: range, timeout: timedelta | None, backend: str | None = None
) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), timeout, backend, use_local_synchronization=True)
