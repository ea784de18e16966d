"""Workers of several ranks: which rank of a worker steps which layer, and what they exchange.

The ranks form a mesh; its rows are the workers. Every layer has an owner, which is a column of the
mesh. In each worker the rank in that column receives the mean of its worker's gradients and steps
the layer together with its peers, the ranks of that column in the other workers. It then sends the
result to its worker. So the ranks of a worker share work and traffic, and no message crosses the
network between workers twice.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from ef21_muon.transport.clipping import clip
from ef21_muon.transport.host import wait
from ef21_muon.transport.shards import is_sharded, local, named, require_shards

DIMENSIONS = ("worker", "rank")
# A collective sends one of so many parts of the model, but at least so many entries per rank.
PARTS, LEAST = 16, 2**20
ALIGNED = 16  # bytes

ByRank = list[list[Tensor]]
Rows = slice | EllipsisType
Piece = tuple[Tensor, Rows, list[Rows]]  # a layer, what this rank sends of it, what each rank sends


def new_mesh(
    ranks_per_worker: int,
    device_type: str,
    timeout: timedelta | None = None,
    backend: str | None = None,
) -> DeviceMesh:
    """Make a mesh of all ranks with dimensions ("worker", "rank"); successive ranks are a worker.

    To be called on all ranks together, after `torch.distributed.init_process_group`.

    Args:
        ranks_per_worker: the number of ranks of each worker, at least 1. It has to divide the
            number of all ranks.
        device_type: of the model, "cpu" or "cuda".
        timeout: how long a rank waits for another one before torch raises; by default torch's,
            which is 30 minutes for gloo and 10 for NCCL.
        backend: of the process groups between workers. "gloo" sends the messages of a GPU through
            the host's memory, which is good for slow networks and needed for `sync_delay`. By
            default that of the default process group.

    Returns:
        A mesh of shape (workers, ranks_per_worker). `mesh["rank"]` is what `fully_shard` takes.

    Raises:
        ValueError: without a process group, or if `ranks_per_worker` does not divide the ranks.

    Example:
        >>> device_mesh = new_mesh(2, "cuda")  # 8 ranks are 4 workers of 2
        >>> fully_shard(model, mesh=device_mesh["rank"], reshard_after_forward=True)
        >>> mesh = WorkerMesh(model.parameters(), mesh=device_mesh)
    """
    given = f"ranks_per_worker={ranks_per_worker}"
    if not dist.is_initialized():
        raise ValueError(f"{given} needs a process group: use torchrun")
    ranks = dist.get_world_size()
    if ranks_per_worker < 1 or ranks % ranks_per_worker:
        raise ValueError(f"{given} does not divide {ranks} ranks: give a divisor")
    mesh = torch.arange(ranks).view(-1, ranks_per_worker)
    peers, _ = dist.new_subgroups_by_enumeration(mesh.T.tolist(), timeout, backend)
    worker, _ = dist.new_subgroups_by_enumeration(mesh.tolist(), timeout)
    return DeviceMesh.from_group([peers, worker], device_type, mesh, mesh_dim_names=DIMENSIONS)


class WorkerMesh:
    """Workers of several ranks: this rank's place, and the owner rank of every layer.

    The optimizers of this library take it as `mesh`. Build it on all ranks together.
    The parameters are whole on all ranks, or all of them are sharded over the ranks of a worker by
    torch's `fully_shard`, with a mesh that is made first (see `new_mesh`). Then the root has to be
    resharded after the forward pass too (`reshard_after_forward=True`): else it would compute with
    the parameters that it gathered before the step. Layers are assigned to owner ranks by size, the
    largest first (LPT assignment).

    Args:
        parameters: of all layers, in the same order on all ranks.
        ranks_per_worker: the number of ranks of each worker, at least 1 and at most the number of
            layers, which divides the number of all ranks. Give it, or `mesh`.
        mesh: from `new_mesh`, or torch's `init_device_mesh` over all ranks with the dimensions
            ("worker", "rank").
        timeout: that of `new_mesh`; only without `mesh`.
        backend: likewise.

    Attributes:
        worker: the process group of this worker's ranks.
        peers: the process group of the ranks which own the same layers, one in each worker.
        own: the parameters that this rank owns, each with the tensor that an optimizer steps: the
            parameter itself, or a whole copy of a sharded one.
        layers: what optimizers ask of the gradients of all parameters.
        stream: the number of this rank's random stream.
        max_norm: the Euclidean norm to which every step clips the worker's gradient, or None, the
            default. Set it alike on all ranks.

    Raises:
        ValueError: on all ranks of a worker, if the arguments do not fit, if there are more ranks
            than layers, or if the parameters are sharded otherwise.

    Example:
        >>> mesh = WorkerMesh(model.parameters(), ranks_per_worker=2)
        >>> optimizer = EF21Muon(param_groups(model), mesh=mesh)  # or, with local steps:
        >>> optimizer = LocalSteps(torch.optim.AdamW(mesh.share(model.parameters())), mesh=mesh)
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
            if ranks_per_worker is None:
                raise ValueError("ranks_per_worker is missing: give it, or mesh")
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
        self._buckets = self._in_buckets(owners)
        self._written: list[tuple[int, ...]] = []
        self.gather_parameters()

    def _in_buckets(self, owners: list[int]) -> list[list[list[Piece]]]:
        """What each collective sends, by owner."""
        entries = sum(parameter.numel() for parameter in self.parameters)
        room = max(LEAST, -(-entries // (PARTS * self.ranks_per_worker)))
        sent = [0] * self.ranks_per_worker
        buckets: defaultdict[int, list[list[Piece]]] = defaultdict(lambda: [[] for _ in sent])
        for parameter, owner in zip(self.parameters, owners, strict=True):
            for piece in self._pieces(parameter, room):
                buckets[sent[owner] // room][owner].append(piece)
                sent[owner] += min(room, parameter.numel())
        return list(buckets.values())

    def _pieces(self, p: Tensor, room: int) -> list[Piece]:
        """The pieces of a layer. A large whole one is split: all ranks send it to its owner."""
        ranks = self.ranks_per_worker
        parts: list[Rows] = [...]
        if self.sharded:  # as torch.chunk does; the last ranks may have none
            count = -(-len(p) // ranks)
            return [(p, ..., [slice(rank * count, (rank + 1) * count) for rank in range(ranks)])]
        if p.numel() > room:
            step = max(1, room * len(p) // p.numel())
            parts = [slice(first, first + step) for first in range(0, len(p), step)]
        return [(p, part, [part] * ranks) for part in parts]

    def name(self, own: Iterable[Layer]) -> None:
        """Enter in `layers` what an optimizer of this rank calls its layers and asks of them.

        The other ranks of the worker receive it at the end of `together`.

        Args:
            own: the optimizer's layers, whose parameters are those of `own`.
        """
        stepped = [id(self.own.get(p)) for p in self.parameters]
        if strange := [one for one in own if id(one.parameter) not in stepped]:
            raise ValueError(
                f"{strange[0].name} {tuple(strange[0].parameter.shape)} is stepped by another rank "
                "of this worker: build the optimizer of mesh.share(groups)"
            )
        self._named = [
            (stepped.index(id(one.parameter)), one.name, one.missing_grad) for one in own
        ]

    def share(self, groups: Iterable) -> list[dict]:
        """The part of parameter groups that this rank steps, for an optimizer that knows no mesh.

        Args:
            groups: parameters, (name, parameter) pairs or parameter groups, as torch's optimizers
                take them.

        Returns:
            Parameter groups with what this rank steps of each parameter that it owns. Groups of
            which it owns nothing are left out.
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

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context in which an error on one rank of the worker is raised on all of its ranks.

        The block must not wait for other ranks of the worker itself.

        Raises:
            ValueError: on the ranks without an error of their own.
        """
        refused: Exception | None = None
        try:
            yield
        except Exception as error:
            refused = error
        mine = (None if refused is None else str(refused)), self._named
        of_ranks = [mine] * self.ranks_per_worker
        dist.all_gather_object(of_ranks, mine, self.worker)
        if refused is not None:
            raise refused
        for message, its in of_ranks:
            if message is not None:
                raise ValueError(message)
            for place, name, missing in its:
                self.layers[place] = self.layers[place]._replace(name=name, missing_grad=missing)

    def total(self, *numbers: int) -> list[int]:
        """The sums of integers over the ranks of the worker, in one collective."""
        on_host = "cpu:" in dist.get_backend_config(self.worker)  # where no device is waited for
        sums = torch.tensor(numbers, device="cpu" if on_host else self.device)
        dist.all_reduce(sums, group=self.worker)
        return sums.tolist()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the gradients over the worker's ranks; each layer's mean goes to its owner.

        Afterwards the other ranks have no gradient of that layer. Whole gradients are summed in the
        order of ranks; sharded ones have been averaged by fully_shard. To be called on all ranks of
        the worker, with gradients of all parameters.
        """
        self.gather_parameters()
        means = {
            p: torch.empty_like(whole, dtype=_gradient(p).dtype) if self.sharded else _gradient(p)
            for p, whole in self.own.items()
        }
        self._to_owners(_gradient, means)
        for parameter in self.parameters:
            parameter.grad = None
        for parameter, mean in means.items():
            self.own[parameter].grad = mean.to(parameter.dtype) if self.sharded else mean
        if self.max_norm is not None:
            clip([*map(_gradient, self.own.values())], self.max_norm, self.worker)

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Update the whole copies of sharded parameters that this rank owns from the shards.

        Nothing is sent unless a shard was written to since. A write to its `.data` or to its
        `detach()` stays unnoticed until `forget` is called.
        """
        if self.sharded and self.total(int(self._written != (now := self._writes())))[0]:
            self._to_owners(lambda parameter: parameter, self.own)
            self._written = now

    def forget(self) -> None:
        """Have `gather_parameters` send next time in any case, as after a state was loaded."""
        self._written = []

    @torch.no_grad()
    def share_parameters(self) -> None:
        """Send every layer from its owner to the worker; drop whole gradients of sharded ones."""
        for held, owned in self._sides(lambda parameter: parameter, self.own):
            if not self.sharded:  # this rank's own are there
                held[self._place] = owned[self._place] = []
            _copy(held, self._send(owned, held))
        if self.sharded:
            for whole in self.own.values():
                whole.grad = None
            self._written = self._writes()

    def _to_owners(self, part: Callable[[Tensor], Tensor], whole: dict[Tensor, Tensor]) -> None:
        """Write into `whole` the rows that ranks hold or, if they hold the whole, the mean."""
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
        """Per bucket: what this rank holds, by owner, and what ranks hold of its own, by rank."""
        for bucket in self._buckets:
            held = [[local(part(p))[mine] for p, mine, _ in pieces] for pieces in bucket]
            owned = [
                [whole[p][of_ranks[rank]] for p, _, of_ranks in bucket[self._place]]
                for rank in range(self.ranks_per_worker)
            ]
            yield held, owned

    def _send(self, tensors: ByRank, like: ByRank) -> ByRank:
        """Send tensors to every rank of the worker, and receive tensors from each.

        In one collective of bytes, so that dtypes and strides may be any.

        Args:
            tensors: by receiver.
            like: by sender, tensors of the shapes and dtypes that are received.

        Returns:
            The received tensors by sender; this rank's own are those that were given.
        """
        sent, sizes, places = self._pack(tensors)
        _copy(places, [*tensors[: self._place], [], *tensors[self._place + 1 :]])
        received, of_others, arrived = self._pack(like)
        to_all = dist.all_to_all_single
        wait([to_all(received, sent, of_others, sizes, group=self.worker, async_op=True)])
        arrived[self._place] = tensors[self._place]
        return arrived

    def _pack(self, lists: ByRank) -> tuple[Tensor, list[int], ByRank]:
        """A buffer for tensors like these, its bytes per rank, and views of it like the tensors."""
        lists = [[] if rank == self._place else one for rank, one in enumerate(lists)]
        sizes = [[-(-t.nbytes // ALIGNED) * ALIGNED for t in one] for one in lists]
        buffer = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8, device=self.device)
        room = iter(buffer.split([*chain(*sizes)]))
        places = [
            [next(room)[: t.nbytes].view(t.dtype).view(t.shape) for t in one] for one in lists
        ]
        return buffer, [*map(sum, sizes)], places

    def _writes(self) -> list[tuple[int, ...]]:
        """The version counters of each parameter and of its rows, and where the rows are stored."""
        return [(p._version, local(p)._version, local(p).data_ptr()) for p in self.parameters]

    def __deepcopy__(self, memo: dict) -> "WorkerMesh":
        """A mesh of copies of the parameters, with the same process groups."""
        memo |= {id(one): one for one in (self.device_mesh, self.peers, self.worker)}
        other = memo[id(self)] = copy(self)
        vars(other).update(deepcopy(vars(self), memo))
        return other

    def close(self) -> None:
        """Destroy the process groups that this object has made; to be called on all ranks."""
        for group in (self.peers, self.worker) if self._made else ():
            dist.destroy_process_group(group)
        self._made = False


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"{named(parameter)} has no gradient on this rank: call backward first")
    return parameter.grad


def _copy(targets: ByRank, sources: ByRank) -> None:
    if any(targets):
        torch._foreach_copy_([*chain(*targets)], [*chain(*sources)])


def together(mesh: WorkerMesh | None) -> AbstractContextManager[None]:
    """A context in which an error on one rank of a worker is raised on all, if there is a mesh."""
    return mesh.together() if mesh else nullcontext()
