"""Workers of several ranks: which rank of a worker steps which layer, and what it gets and gives.

Ranks form a mesh, whose rows are workers. Every layer has an owner, one of the columns: in each
worker the rank of that column gets the mean of its worker's gradients, steps the layer with its
peers, the ranks of its column in the other workers, and gives the result to its worker. So work and
traffic are spread over the ranks of a worker, and nothing crosses twice.
"""

from collections import UserDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from datetime import timedelta
from itertools import chain
from types import EllipsisType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from ef21_muon.layers import Layer, assign
from ef21_muon.transport.fixed import ALONE, Group, place_in
from ef21_muon.transport.host import wait
from ef21_muon.transport.shards import is_sharded, local, named, require_shards

DIMENSIONS = ("worker", "rank")
# A collective takes room for about this part of the model, or as many entries for every rank.
PARTS, LEAST = 16, 2**20
ALIGNED = 16  # bytes

ByRank = list[list[Tensor]]
Rows = slice | EllipsisType
Piece = tuple[Tensor, Rows, list[Rows]]  # a layer, what a rank sends of its own, and whose is what


def new_mesh(
    ranks_per_worker: int,
    device_type: str,
    timeout: timedelta | None = None,
    backend: str | None = None,
) -> DeviceMesh:
    """A mesh of all ranks with dimensions "worker" and "rank": successive ranks are one worker.

    timeout: of a wait for another rank; backend: of "worker", where with "gloo" messages go through
    the host's memory; by default torch's. Raises ValueError where `ranks_per_worker` does not
    divide the ranks, and without a process group.
    """
    given = f"ranks_per_worker={ranks_per_worker}"
    if not dist.is_initialized():
        raise ValueError(f"{given} needs a process group: use torchrun")
    ranks = dist.get_world_size()
    if (ranks_per_worker or 0) < 1 or ranks % ranks_per_worker:
        raise ValueError(f"{given} does not divide {ranks} ranks: give a divisor")
    mesh = torch.arange(ranks).view(-1, ranks_per_worker)
    peers, _ = dist.new_subgroups_by_enumeration(mesh.T.tolist(), timeout, backend)
    worker, _ = dist.new_subgroups_by_enumeration(mesh.tolist(), timeout)
    return DeviceMesh.from_group([peers, worker], device_type, mesh, mesh_dim_names=DIMENSIONS)


class WorkerMesh:
    """This rank's place in its worker, and the owner of every layer.

        mesh = WorkerMesh(model.parameters(), ranks_per_worker=2)
        optimizer = EF21Muon(groups, mesh=mesh)
        optimizer = LocalSteps(torch.optim.AdamW(mesh.share(groups)), mesh=mesh)

    parameters: of all layers, in the same order on all ranks, whole, or all of them sharded over
    the ranks of the worker, by a mesh that is made first:

        device_mesh = new_mesh(2, "cuda")  # or torch's init_device_mesh
        fully_shard(model, mesh=device_mesh["rank"], reshard_after_forward=True)
        mesh = WorkerMesh(model.parameters(), mesh=device_mesh)

    Reshard the root too, or it computes on with what it has gathered before. `ranks_per_worker`,
    `timeout` and `backend`, in place of `mesh`, are those of `new_mesh`.

    `worker` is the process group of this worker's ranks, `peers` that of the ranks which own the
    same layers in all workers; `own` has every parameter that this rank owns, with what an
    optimizer steps of it: itself, or a whole copy of a sharded one; `layers` has of all what is
    asked of gradients. `stream` is the number of this rank's random stream. `max_norm`, to be set
    alike on all ranks, clips the worker's gradient in every step. Raises ValueError, on all ranks
    of a worker, where one has no layer, or shards of another mesh.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        ranks_per_worker: int | None = None,
        *,
        mesh: DeviceMesh | None = None,
        timeout: timedelta | None = None,
        backend: str | None = None,
    ):
        self.parameters = list(dict.fromkeys(parameters))
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._made = mesh is None
        if mesh is None:
            mesh = new_mesh(ranks_per_worker, self.device.type, timeout, backend)
        elif (ranks_per_worker, timeout, backend) != (None, None, None):
            raise ValueError("mesh has its ranks, timeout and backends already: give it alone")
        elif mesh.mesh_dim_names != DIMENSIONS or mesh.size() != dist.get_world_size():
            raise ValueError(f"mesh={mesh} is not of all ranks as {DIMENSIONS}: give new_mesh(...)")
        self.device_mesh, self.ranks_per_worker = mesh, mesh.size(1)
        self.peers, self.worker = mesh.get_all_groups()
        self.stream, self._place = dist.get_rank(), dist.get_rank(self.worker)
        self.max_norm: float | None = None
        self.sharded = any(map(is_sharded, self.parameters))
        self.layers = [Layer(named(p), p, p.numel(), "error") for p in self.parameters]
        self._named: list[tuple[int, str, str]] = []  # of the layers that this rank owns
        try:
            with self.together():
                if len(self.parameters) < mesh.size(1):
                    raise ValueError(
                        f"ranks_per_worker={mesh.size(1)} leaves ranks without a layer: the model "
                        f"has {len(self.parameters)}, give at most as many"
                    )
                if self.sharded:
                    require_shards(self.parameters, dist.get_process_group_ranks(self.worker))
        except Exception:
            self.close()
            raise
        owners = assign([p.numel() for p in self.parameters], self.ranks_per_worker)
        self.own = {
            p: Parameter(local(p).new_empty(p.shape)) if self.sharded else p
            for p, owner in zip(self.parameters, owners, strict=True)
            if owner == self._place
        }
        self._given = {stepped: parameter for parameter, stepped in self.own.items()}
        self._buckets = self._in_buckets(owners)
        self._written: list[tuple[int, ...]] = []
        self.gather_parameters()

    def _in_buckets(self, owners: list[int]) -> list[list[list[Piece]]]:
        """By collective and owner what is sent."""
        entries = sum(parameter.numel() for parameter in self.parameters)
        room = max(LEAST, -(-entries // (PARTS * self.ranks_per_worker)))
        sent = [0] * self.ranks_per_worker
        buckets = defaultdict(lambda: [[] for _ in sent])
        for parameter, owner in zip(self.parameters, owners, strict=True):
            for piece in self._pieces(parameter, room):
                buckets[sent[owner] // room][owner].append(piece)
                sent[owner] += min(room, parameter.numel())
        return list(buckets.values())

    def _pieces(self, p: Tensor, room: int) -> list[Piece]:
        """Of a layer; a large whole one in parts, since its owner gets them from every rank."""
        ranks, parts = self.ranks_per_worker, [...]
        if self.sharded:  # as torch.chunk does; the last ranks may have none
            count = -(-len(p) // ranks)
            return [(p, ..., [slice(rank * count, (rank + 1) * count) for rank in range(ranks)])]
        if p.numel() > room:
            step = max(1, room * len(p) // p.numel())
            parts = [slice(first, first + step) for first in range(0, len(p), step)]
        return [(p, part, [part] * ranks) for part in parts]

    def name(self, own: list[Layer]) -> None:
        """What an optimizer of this rank calls its layers, and asks of them, in `layers`.

        Other ranks of the worker learn it at the end of `together`.
        """
        stepped = [id(self.own.get(p)) for p in self.parameters]
        self._named = [
            (stepped.index(id(one.parameter)), one.name, one.missing_grad) for one in own
        ]

    def share(self, groups: Iterable) -> list[dict]:
        """Of parameter groups the part that this rank steps, with what it steps of each parameter.

        groups: as torch's optimizers take them; those of which it has nothing are left out.
        """
        groups = list(groups)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        shared = [{**group, "params": list(self._owned(group["params"]))} for group in groups]
        return [group for group in shared if group["params"]]

    def _owned(self, parameters: Iterable) -> Iterator:
        for one in parameters:
            name, parameter = one if isinstance(one, tuple) else (None, one)
            if (stepped := self.own.get(parameter)) is not None:
                yield stepped if name is None else (name, stepped)

    def given(self, stepped: Tensor) -> Tensor:
        """The parameter of the model of which this is what an optimizer steps."""
        return self._given.get(stepped, stepped)

    def as_given(self, groups: Sequence[dict]) -> list[dict]:
        """Groups of what is stepped as groups of the model's own parameters, with the same values.

        Where layers are not sharded, they are that already.
        """
        return [_Given(group, self) for group in groups] if self.sharded else list(groups)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it an error of one rank of the worker is raised on all, on others as ValueError.

        Not for what waits for other ranks of the worker itself.
        """
        refused = None
        try:
            yield
        except Exception as error:
            refused = error
        of_ranks = [None] * self.ranks_per_worker
        dist.all_gather_object(of_ranks, (refused and str(refused), self._named), self.worker)
        if refused is not None:
            raise refused
        for message, its in of_ranks:
            if message is not None:
                raise ValueError(message)
            for place, name, missing in its:
                self.layers[place] = self.layers[place]._replace(name=name, missing_grad=missing)

    def total(self, *numbers: int) -> list[int]:
        """The sums of the numbers over the ranks of the worker, in one collective."""
        on_host = "cpu:" in dist.get_backend_config(self.worker)  # where no device is waited for
        sums = torch.tensor(numbers, device="cpu" if on_host else self.device)
        dist.all_reduce(sums, group=self.worker)
        return sums.tolist()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """The mean of the worker's gradients, on the rank that owns a layer; elsewhere none.

        Whole ones are summed in the order of ranks; sharded ones fully_shard has averaged. All
        ranks have brought the gradients of all `layers`.
        """
        self.gather_parameters()
        means = {
            p: torch.empty_like(whole, dtype=p.grad.dtype) if self.sharded else p.grad
            for p, whole in self.own.items()
        }
        self._to_owners(lambda parameter: parameter.grad, means)
        for parameter in self.parameters:
            parameter.grad = None
        for parameter, mean in means.items():
            self.own[parameter].grad = mean.to(parameter.dtype) if self.sharded else mean
        if self.max_norm is not None:
            clip([one.grad for one in self.own.values()], self.max_norm, self.worker)

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """What this rank steps of sharded layers, as the shards are.

        Sent only where somebody has written to a shard since. What is written into its `.data`, or
        into its `detach()`, goes unnoticed until `forget`.
        """
        if self.sharded and self.total(int(self._written != (now := self._writes())))[0]:
            self._to_owners(lambda parameter: parameter, self.own)
            self._written = now

    def forget(self) -> None:
        """Gather next time, whoever has written what, as after a state was loaded."""
        self._written = []

    @torch.no_grad()
    def share_parameters(self) -> None:
        """Every layer as its owner has it; of sharded ones the whole gradients are let go."""
        for held, owned in self._sides(lambda parameter: parameter, self.own):
            if not self.sharded:  # this rank's own are there
                held[self._place] = owned[self._place] = []
            _copy(held, self._send(owned, held))
        if self.sharded:
            for whole in self.own.values():
                whole.grad = None
            self._written = self._writes()

    def _to_owners(self, part: Callable[[Tensor], Tensor], whole: dict[Tensor, Tensor]) -> None:
        """Into `whole` its rows, or the mean of what ranks hold of it."""
        for held, owned in self._sides(part, whole):
            received = self._send(held, owned)
            if not self.sharded and received[0]:
                for others in received[1:]:
                    torch._foreach_add_(received[0], others)
                torch._foreach_div_(received[0], self.ranks_per_worker)
                del received[1:], owned[1:]
            _copy(owned, received)

    def _sides(
        self, part: Callable[[Tensor], Tensor], whole: dict[Tensor, Tensor]
    ) -> Iterator[tuple[ByRank, ByRank]]:
        """By bucket what this rank holds for each owner, and what each holds of its own layers."""
        for bucket in self._buckets:
            held = [[local(part(p))[mine] for p, mine, _ in pieces] for pieces in bucket]
            owned = [
                [whole[p][of_ranks[rank]] for p, _, of_ranks in bucket[self._place]]
                for rank in range(self.ranks_per_worker)
            ]
            yield held, owned

    def _send(self, tensors: ByRank, like: ByRank) -> ByRank:
        """Send tensors to every rank of the worker, and return what came from each: `like` these.

        In one collective, in bytes, whatever their types and strides; this rank's own as they are.
        """
        sent, sizes, places = self._pack(tensors)
        _copy(places, [*tensors[: self._place], [], *tensors[self._place + 1 :]])
        received, of_others, arrived = self._pack(like)
        to_all = dist.all_to_all_single
        wait([to_all(received, sent, of_others, sizes, group=self.worker, async_op=True)])
        arrived[self._place] = tensors[self._place]
        return arrived

    def _pack(self, lists: ByRank) -> tuple[Tensor, list[int], ByRank]:
        """A buffer for tensors like these, its bytes for every rank, and places of the tensors."""
        lists = [[] if rank == self._place else one for rank, one in enumerate(lists)]
        sizes = [[-(-t.nbytes // ALIGNED) * ALIGNED for t in one] for one in lists]
        buffer = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8, device=self.device)
        room = iter(buffer.split([*chain(*sizes)]))
        places = [
            [next(room)[: t.nbytes].view(t.dtype).view(t.shape) for t in one] for one in lists
        ]
        return buffer, [*map(sum, sizes)], places

    def _writes(self) -> list[tuple[int, ...]]:
        """How often each parameter was written, as a whole and by its rows, and where these are."""
        return [(p._version, local(p)._version, local(p).data_ptr()) for p in self.parameters]

    def __deepcopy__(self, memo: dict) -> "WorkerMesh":
        """Of the parameters' copies, by the same process groups."""
        memo |= {id(one): one for one in (self.device_mesh, self.peers, self.worker)}
        other = memo[id(self)] = copy(self)
        vars(other).update(deepcopy(vars(self), memo))
        return other

    def close(self) -> None:
        """Destroy the process groups that were made here; to be called on all ranks."""
        for group in (self.peers, self.worker) if self._made else ():
            dist.destroy_process_group(group)
        self._made = False


class _Given(UserDict):
    """A parameter group with the model's own parameters, whose other entries are the group's."""

    def __init__(self, group: dict, mesh: WorkerMesh):
        self.data, self.params = group, [mesh.given(one) for one in group["params"]]

    def __getitem__(self, key: str):
        return self.params if key == "params" else self.data[key]


def _copy(targets: ByRank, sources: ByRank) -> None:
    if any(targets):
        torch._foreach_copy_([*chain(*targets)], [*chain(*sources)])


def clip(gradients: Sequence[Tensor], max_norm: float, group: Group = ALONE) -> None:
    """Scale gradients, in place, to a Euclidean norm of all of them together of at most `max_norm`.

    As torch.nn.utils.clip_grad_norm_, but that a norm which is not finite changes nothing, so that
    the layer it comes from can be named. group: ranks that have the worker's other gradients; to be
    called on all of them. Does not wait for the device.
    """
    square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    if place_in(group)[1] > 1:
        dist.all_reduce(square, group=group)
    norm = square.sqrt()
    scale = torch.where(norm.isfinite(), max_norm / (norm + 1e-6), 1.0).clamp_(max=1.0)
    torch._foreach_mul_(gradients, scale.float())
