"""What the optimizers that send messages share: the parts that they hold, and public calls."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ef21_muon import copies, state, views
from ef21_muon.checks import inspection
from ef21_muon.checks.arithmetic import Results, of_decoding, where_bits_agree
from ef21_muon.checks.guards import Guards, Notice, PhaseTimer, UnsentSteps, broken_at
from ef21_muon.checks.identity import settings_of
from ef21_muon.checks.renamed import ATTRIBUTES
from ef21_muon.checks.settings import choice, refuse_compressed_shifts
from ef21_muon.compressors import Compressor
from ef21_muon.compressors.base import new_generator
from ef21_muon.exchange import exchange
from ef21_muon.layers import AUTO, Batch, Layer, form_batches, layers_of
from ef21_muon.transport.agreement import (
    UNEQUAL,
    require_equal_parameters,
    require_equal_settings,
)
from ef21_muon.transport.buffers import Buffers
from ef21_muon.transport.fixed import Group, Traffic, Transport, place_in
from ef21_muon.transport.load import Load, loads
from ef21_muon.transport.mesh import WorkerMesh
from ef21_muon.transport.schedule import Rounds
from ef21_muon.transport.shards import require_whole
from ef21_muon.transport.stragglers import StragglerMonitor

if TYPE_CHECKING:
    from ef21_muon.correction import Correction
    from ef21_muon.inner import Wrapped


class Communicating(torch.optim.Optimizer):
    """An optimizer whose `step()` after `loss.backward()` sends messages, on all workers together.

    Gradients are local: do not wrap the model in DistributedDataParallel. With an initialised
    process group every rank is a worker; without one there is a single worker, and nothing is sent.
    A rank that waits for another one in a step reports for whom it waits. Byte counts are of this
    rank; those of a worker with several ranks are their sums (`mesh.total`).

    Attributes:
        batches: layers of equal shape and group, with their state and channels.
        rules: compressors of every parameter group.
        transport: sends messages and counts their bytes.
        guards: what is refused before a step changes anything.
        generators: of random numbers in messages, seeded by seed, rank and purpose.
        timer: seconds of each phase of the steps.
        inner: optimizers that this one is around; none in EF21Muon.
        steps: steps taken so far.

    Raises:
        ValueError: for parameters and settings that differ between ranks.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler leaves it to `step` to skip
    RULE: tuple[str, ...] = ()  # entries of a parameter group that are objects, not numbers
    BROKEN = "the gradient of {} was not finite at step {}"
    inner: Sequence[torch.optim.Optimizer] = ()
    wrapped: "Wrapped | None" = None  # where there are inner optimizers
    rules: Sequence[dict] = ()
    batches: Sequence[Batch] = ()
    stragglers: StragglerMonitor | None = None  # from the first step on, among other workers
    server: str | None = None  # the placement
    rounds = Rounds(1)  # one step each; local steps have others
    correction: "Correction | None" = None  # of gradients, by a second gradient per batch
    unsent: UnsentSteps | None = None  # of local steps

    def __init__(
        self,
        params: ParamsT,
        defaults: dict,
        *,
        seed: int,
        process_group: Group,
        mesh: WorkerMesh | None = None,
        transport: Transport | None = None,
        missing_grad: str = "error",
        buffers: nn.Module | None = None,
        purposes: Sequence[str] = ("w2s", "s2w"),
    ):
        super().__init__(params, defaults)
        process_group = mesh.peers if mesh else process_group
        transport = transport or Transport(process_group)
        self.missing_grad = choice("missing_grad", missing_grad, ("error", "zero"))
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if not parameters:
            raise ValueError("the parameter groups hold no parameter: give those of the model")
        if transport.sends:
            require_whole(parameters, type(self).__name__)
        self.transport, self.mesh, self.process_group = transport, mesh, process_group
        # With a mesh all ranks are more than the peers that hold the same layers.
        self.everyone = None if mesh else process_group
        rank, self.ranks = place_in(process_group)
        rank = mesh.stream if mesh else rank
        stream = rank if transport.stream is None else transport.stream
        self.device = parameters[0].device
        self.buffers = Buffers(buffers, self.everyone)
        self.timer = PhaseTimer(self.device)
        self.steps, self.begun = 0, False  # begun: whether a step was taken since the state was new
        self.placements: dict[str, Load] = {}
        self.generators = {
            purpose: new_generator(self.device, seed, stream, purpose) for purpose in purposes
        }

    def new_batches(
        self, server: str, costs: list[int], own: Callable[[str], Results] = lambda server: iter(())
    ) -> list[Batch]:
        """Form batches of the layers of `rules`, and place their servers.

        Args:
            server: placement; "auto" is the one with the least load where all ranks get alike bits.
            costs: multiplications to serve each layer.
            own: what every rank computes for itself with a placement, beside decoding messages.

        Raises:
            ValueError: where ranks get other bits with every placement that is allowed.
        """
        allowed = [server]
        if server == AUTO:
            self.placements = loads(self.rules, costs, self.transport.ranks)
            allowed = [*self.placements]
        if allowed[0] == "replicated":
            refuse_compressed_shifts(self.rules)

        def computed(server: str) -> Results:
            return chain(of_decoding(self.rules, server), own(server))

        self.server = where_bits_agree(allowed, computed, self.device, self.process_group)
        place = self.transport.rank, self.transport.ranks
        return form_batches(self.rules, costs, self.server, *place)

    def begin(self, batches: Sequence[Batch], layers: Sequence[Layer] | None = None) -> None:
        """Take these batches, and compare parameters and settings between ranks.

        Args:
            batches: of all layers that this rank steps. To be called last in a constructor.
            layers: layers whose gradients a step needs; by default those of the batches.

        Raises:
            ValueError: for parameters or settings that differ between ranks.
        """
        self.batches = batches
        views.show_groups(self)
        views.show_state(self)
        layers = layers_of(batches, self.missing_grad) if layers is None else layers
        if self.mesh:
            self.mesh.name(layers)
            layers = self.mesh.layers
        self.guards = Guards(self, layers)
        self._built_as = settings_of(self)
        require_equal_settings(self._built_as, self.device, self.process_group)
        require_equal_parameters(self._shared(), self.process_group, UNEQUAL)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group while the optimizer is built.

        Raises:
            RuntimeError: later, since layers are batched once.
        """
        if self.batches:
            raise RuntimeError(
                f"{type(self).__name__} forms its batches once: pass all groups when it is built"
            )
        super().add_param_group(param_group)

    def average_buffers(self) -> None:
        """Set the model's averaged buffers to the mean of all workers'."""
        self.transport.traffic += self.buffers.average()

    def exchange_compressor(self, w2s: Compressor | str, group: str | None = None) -> None:
        """Send with another compressor from the next round on; on all ranks, between rounds.

        Args:
            w2s: compressor, or its spec, as "topk:0.01".
            group: name of the parameter groups that it is for; by default all, vectors too.

        Raises:
            ValueError: for an unknown compressor or group, with a sync_delay, and where ranks
                decode to other bits.
        """
        exchange(self, w2s, group)

    @property
    def under_way(self) -> Sequence[Batch]:
        """Batches of layers whose messages have not arrived at the servers."""
        return ()

    @property
    def _swapped(self) -> bool:
        """Whether parameters and W have changed places."""
        return False

    if not TYPE_CHECKING:  # which would take any name for an attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Refuse names of earlier versions, and unknown ones."""
            new = f": it has been renamed, give {ATTRIBUTES[name]}" if name in ATTRIBUTES else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{new}")

    @property
    def round(self) -> int:
        """Whole rounds taken so far, without the shorter one of `final_sync`."""
        return self.rounds.of(self.steps)[0]

    def final_sync(self) -> None:
        """Send what was not sent at the end of training: only `LocalSteps` has something left."""

    def global_params(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters are W, on which all workers agree.

        Only with `LocalSteps` they are not W outside of it.

        Example:
            with optimizer.global_params():
                evaluate(model)
        """
        return nullcontext()

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank has sent and received so far."""
        return self.transport.traffic

    @property
    def w2s_bytes(self) -> int:
        """Bytes that this rank has sent to the servers, also to itself, or to collectives."""
        return self.traffic.w2s_bytes

    @property
    def s2w_bytes(self) -> int:
        """Bytes of messages that this rank has received from the servers, or from collectives."""
        return self.traffic.s2w_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes of messages that this rank has received so far.

        They are `s2w_bytes` or, with replicated servers, the messages of all other workers.
        """
        return self.traffic.received_bytes

    @property
    def wire_tx_bytes(self) -> int:
        """Bytes that this rank has handed to the network so far, without messages to itself."""
        return int(self.traffic.wire_tx_bytes)

    @property
    def watch(self) -> bool:
        """Whether the loss of messages is recorded; setting it forgets earlier records."""
        return any(batch.up.recording for batch in self.batches)

    @watch.setter
    def watch(self, value: bool) -> None:
        for batch in self.batches:
            batch.up.recording, batch.up.contraction = value, None

    @property
    def watched(self) -> bool:
        """Whether a message of every layer was recorded since `watch` was set."""
        return all(batch.up.contraction is not None for batch in self.batches)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Report what compression did to each layer in the last recorded messages.

        Returns:
            By layer's name: w2s_contraction, 1 - ||C_j(x) - x||^2 / ||x||^2 of this worker's
            message, the alpha that it achieved; estimator_error, ||M_j - G_j|| / ||M_j||; and, of
            layers that this rank serves, model_shift_error, ||X - W|| / ||X||.

        Raises:
            RuntimeError: if no message was recorded, or within `global_params()`.

        Example:
            optimizer.watch = True
            optimizer.step()
            print(optimizer.diagnostics()["head.weight"]["w2s_contraction"])
        """
        self.require_own_parameters("diagnostics()")
        if not self.watched:
            raise RuntimeError("no message was recorded: set watch=True before the step")
        return inspection.losses(self.batches)

    def check_finite(self) -> None:
        """Check that all gradients and messages of this worker were finite.

        Waits for the device, so call it where the loss is read.

        Raises:
            FloatingPointError: names the first step and layer whose gradient or message was not.
        """
        inspection.require_finite_steps(self.batches, self.BROKEN)

    def check_agreement(self) -> None:
        """Check that all workers hold this optimizer's W, buffers and options alike, and G.

        To be called on all ranks together. Sends a few bytes per layer; EF21's G is compared with
        the mean of G_j by random projections. Waits for the device.

        Raises:
            ValueError: names the rank, and the layer or group, that differs.
            FloatingPointError: for what was not finite on any worker.
        """
        self.require_own_parameters("check_agreement()")
        problem = None
        try:
            self.check_finite()
        except FloatingPointError as error:
            problem = str(error)
        inspection.require_agreement(self, self._shared(), problem)

    def require_own_parameters(self, call: str) -> None:
        """Refuse a call, by a RuntimeError, that would take W for this worker's own parameters."""
        if self._swapped:
            raise RuntimeError(
                f"{call} within global_params(): the parameters are W there, leave it first"
            )

    def state_dict(self) -> dict:
        """Return a copy of what this rank remembers, that later steps do not change.

        Ranks remember different things, so every rank saves its own state, or all ranks call
        `full_state_dict`, or save into one folder by torch.distributed.checkpoint, whose functions
        `get_optimizer_state_dict` and `set_optimizer_state_dict` work with and without
        `fully_shard` (`ef21_muon.state` has the form and an example).

        Returns:
            "param_groups", in which objects, as norms, are text; and "state", by parameter and
            table, with {"rank0": tensor} of this rank.

        Raises:
            RuntimeError: within `global_params()`, where the parameters are W.
            ValueError: where torch asks with full_state_dict=True on several ranks.
        """
        return state.save(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Continue exactly from a state of the same rank, parameters and options.

        Load the model's state too, which is not checked; with `LocalSteps` that of the same rank,
        since x_j differ between workers. The state is copied. Options of groups become those of the
        state, as with torch's optimizers; lr, missing_grad, buckets and seed may differ from here.

        Args:
            state_dict: what `state_dict` of this rank or `full_state_dict` returned.

        Raises:
            ValueError: if the state does not fit; nothing has changed then.
            RuntimeError: within `global_params()`, where the parameters are W.
        """
        state.load(self, state_dict)

    def full_state_dict(self) -> dict | None:
        """Return what all ranks remember, on rank 0, and None on others; to be called on all ranks.

        Every rank loads it by `load_state_dict`.

        Example:
            saved = optimizer.full_state_dict()
            if dist.get_rank() == 0:
                torch.save(saved, "optimizer.pt")
        """
        return state.gather(self)

    def resume_after(self, steps: int) -> None:
        """Count on from as many steps, with a state that was loaded or copied."""
        self.steps, self.begun = steps, steps > 0
        self.timer = PhaseTimer(self.timer.device)
        self.guards.notice = Notice()
        if self.mesh:
            self.mesh.forget()
        for batch in self.batches:  # what was not finite was before
            for at in broken_at(batch):
                at.zero_()
        for optimizer in self.wrapped.ours if self.wrapped else ():
            optimizer.resume_after(steps)

    def __deepcopy__(self, memo: dict) -> "Communicating":
        return copies.deepcopy_of(self, memo)

    def __getstate__(self) -> dict:
        return copies.values_of(self)

    def __setstate__(self, values: dict) -> None:
        super().__setstate__(values)
        copies.restore(self)

    def _shared(self) -> list[tuple[str, Tensor]]:
        """What all workers hold alike, by name."""
        return [*(one for b in self.batches for one in b.shared()), *self.buffers.shared.items()]
