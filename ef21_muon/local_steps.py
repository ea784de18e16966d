"""Local steps: workers step by themselves, and average their changes in rounds."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ef21_muon.channel import finite, mark
from ef21_muon.checks.guards import UnsentSteps, evaluate, in_step, overflowed
from ef21_muon.checks.renamed import refuses_renamed
from ef21_muon.checks.settings import (
    OUTER_NUMBERS,
    Compressors,
    check_mean,
    check_number,
    choice,
    compressor_of,
    flag,
    refuse_unused_decays,
    whole_number,
)
from ef21_muon.communicating import Communicating
from ef21_muon.compressors import Compressor
from ef21_muon.compressors.base import add_mean_over_senders, require_marks
from ef21_muon.inner import Wrapped
from ef21_muon.layers import (
    FEEDBACK,
    Batch,
    entry_counts,
    in_buckets,
)
from ef21_muon.local_state import GlobalParams, keep_messages, make_room, move
from ef21_muon.transport.fixed import ALONE, Group, Stages, Transport, run
from ef21_muon.transport.host import require_host
from ef21_muon.transport.mesh import WorkerMesh, together
from ef21_muon.transport.schedule import Rounds, Start, SyncSchedule


class LocalSteps(Communicating):
    """Workers take local steps of an inner optimizer, and average their changes every few steps.

    DiLoCo around any torch optimizer, with compressed messages and the servers of `EF21Muon`. Every
    `sync_every` calls of `step()` (H in papers) end with a round, one exchange of messages:

        worker:   D_j = W - x_j + error_decay e_j;  R_j = C_j(D_j);  e_j = D_j - R_j
        server:   g = mean of R_j;  V = outer_momentum V + g
                  S = C(outer_lr (g + outer_momentum V) + e_s);  e_s = what C lost
        worker:   W = W - S;  x_j = W

    W - x_j is the pseudo-gradient, and e_j the error-feedback buffer. The model's parameters are
    this worker's x_j. W is what all workers agree on, bit for bit: evaluate and save it within

        with optimizer.global_params():
            ...

    and call `final_sync()` after the last step, or the steps since the last round are lost; an
    optimizer that is dropped with unsent steps warns.

    Args:
        inner: optimizer, or several of different parameters, that send nothing: torch's own, or
            `EF21Muon(..., process_group=ef21_muon.ALONE)` with w2s and s2w left at "identity".
            `param_groups` are theirs, so schedulers act on their lr.
        sync_every: local steps per round, at least 1; or {first step: steps per round} where it
            changes, as {0: 120, 360: 60}.
        w2s: compressor of messages to the servers, or its spec, as "sign"; or a mapping from the
            names of parameter groups, their entry "name", to compressors, with one for every group.
            By default messages are float32.
        s2w: compressor of messages to the workers, likewise.
        outer_lr: factor of the mean pseudo-gradient, above 0.
        outer_momentum: weight of earlier rounds in V, in [0, 1).
        nesterov: whether V is Nesterov's; without it S = C(outer_lr V + e_s).
        feedback: "ef14" as above; "ef21", R_j = C_j(W - x_j - G_j), G_j = G_j + R_j and
            g = g + mean of R_j; or "none".
        error_decay: share of e_j that is kept per round, in [0, 1]; for "ef14".
        mean: "all" workers; or "senders": with sparse messages an entry's mean is over the workers
            that sent it, and 0 where none did (SparseLoCo).
        server: which ranks serve the layers: "sharded", "rank0", "replicated", or "auto", as in
            `EF21Muon`.
        buckets: parts that layers are sent in, at least 1.
        streaming: True gives every batch of layers its own turn within the round, so that the link
            is used evenly (Streaming DiLoCo).
        sync_delay: steps that a message travels each way while training continues; at least 0. x_j
            then moves by what W moved and keeps the steps taken since. Not with NCCL.
        seed: of random numbers in compressors, in which all ranks differ anyway.
        buffers: the model, whose floating-point buffers become the mean of all workers' in every
            round; within `global_params()` they are those of the last round.
        mesh: `WorkerMesh` of workers with several ranks: gradients are averaged within a worker in
            every step, and `inner` holds `mesh.share(groups)`. A root of `fully_shard` needs
            reshard_after_forward=True. Parameters without a gradient are refused, unless their
            inner EF21Muon has missing_grad="zero".
        transport: carries the messages: a fleet (`ef21_muon.fleet`) for workers that come and go;
            by default the process group.
        process_group: of all workers, one rank each; by default torch's default group.

    Raises:
        ValueError: for options out of range; an inner optimizer that sends, needs a closure, or has
            state other than float tensors; and ranks that decode messages to other bits.
        RuntimeError: from `step`, where no parameter has a gradient.

    A single worker with lossless messages, an outer_lr of 1 and no outer_momentum is its inner
    optimizer. Memory per float32 parameter: 8 bytes for W and e_j, 4 more for V and 4 for e_s on
    the rank that serves it; a sync_delay takes 4 more and the messages under way.

    Example:
        >>> layer = torch.nn.Linear(8, 8)
        >>> inner = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        >>> optimizer = LocalSteps(inner, sync_every=2, w2s="sign", outer_momentum=0.5)
        >>> for _ in range(3):
        ...     layer(torch.ones(8)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.final_sync()

    References:
        DiLoCo: Douillard et al., arXiv:2311.08105. MuLoCo: arXiv:2505.23725. SparseLoCo:
        arXiv:2508.15706. Streaming DiLoCo: arXiv:2501.18512.
    """

    wrapped: Wrapped
    unsent: UnsentSteps
    BROKEN = "{} is not finite after step {}"

    @refuses_renamed
    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        sync_every: int | Mapping[int, int] = 30,
        *,
        w2s: Compressors = "identity",
        s2w: Compressors = "identity",
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nesterov: bool = True,
        feedback: str = "ef14",
        error_decay: float = 1.0,
        mean: str = "all",
        server: str = "auto",
        buckets: int = 4,
        streaming: bool = False,
        sync_delay: int = 0,
        seed: int = 0,
        buffers: nn.Module | None = None,
        mesh: WorkerMesh | None = None,
        transport: Transport | None = None,
        process_group: Group = None,
    ):
        self.rounds = Rounds(sync_every)
        self.sync_delay = whole_number("sync_delay", sync_delay, least=0)
        self.outer_lr = check_number("outer_lr", outer_lr, OUTER_NUMBERS)
        self.outer_momentum = check_number("outer_momentum", outer_momentum, OUTER_NUMBERS)
        self.error_decay = check_number("error_decay", error_decay, OUTER_NUMBERS)
        self.nesterov, self.streaming = flag("nesterov", nesterov), flag("streaming", streaming)
        whole_number("buckets", buckets, least=1)
        self.feedback = choice("feedback", feedback, FEEDBACK)
        refuse_unused_decays([{"error_decay": self.error_decay, "server_momentum": 0}], feedback)
        self.mean = check_mean(mean, feedback)
        if transport:
            server = transport.require_options(server, streaming, sync_delay, feedback, buffers)
        place: dict[str, Any] = dict(process_group=process_group, mesh=mesh, transport=transport)
        with together(mesh):
            self.wrapped = Wrapped(inner)
            self.inner = self.wrapped.optimizers
            super().__init__(self.wrapped.param_groups, {}, seed=seed, buffers=buffers, **place)
            if sync_delay and self.process_group != ALONE and self.ranks > 1:
                require_host(self.process_group, self.device, f"sync_delay={sync_delay}")
            self.rules = self.wrapped.take(self, w2s, s2w)
            batches = self.new_batches(server, entry_counts(self.rules))
            for batch in batches:
                make_room(self, batch)
            most = 1 if self.transport.heals else buckets
            self.buckets = [[b] for b in batches] if streaming else in_buckets(batches, most)
            self.schedule = SyncSchedule(self.buckets, self.rounds, sync_delay, streaming)
            for batch in batches if sync_delay else ():
                keep_messages(batch, both_ways=self.schedule.directions == 2)
            # Where an inner optimizer skips what has no gradient, several ranks cannot.
            self.begin(batches, self.wrapped.layers(batches, "error" if mesh else "skip"))
        self._global = GlobalParams(batches, self.wrapped, self.buffers, mesh)
        self.last_sync = 0  # local steps until the last round
        self.unsent = UnsentSteps(self, self.transport.rank)
        self.transport.attach(self)

    def exchange_compressor(self, w2s: Compressor | str, group: str | None = None) -> None:
        if self.transport.heals:
            raise ValueError("a compressor is not exchanged in a fleet: begin another run with it")
        if self.streaming and self.rounds.of(self.steps)[1]:
            raise ValueError(
                f"a compressor is not exchanged after step {self.steps}, in a round in which some "
                "layers were sent: do so after its last step"
            )
        w2s = compressor_of("w2s", w2s)
        if self.mean == "senders":
            for batch in self.batches:
                require_marks(w2s.fit(*batch.shape), *batch.shape)
        super().exchange_compressor(w2s, group)
        self.schedule = SyncSchedule(self.buckets, self.rounds, self.sync_delay, self.streaming)

    @property
    def under_way(self) -> list[Batch]:
        """Batches of layers whose messages have not arrived at the servers."""
        return self.schedule.undelivered(self.steps)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Take a step of the inner optimizer, and the part of a round that is due after it.

        Args:
            closure: function that evaluates a batch, calls backward and returns the loss.

        Returns:
            The closure's loss, None without a closure.

        Raises:
            RuntimeError: where no parameter has a gradient, and within `global_params()`.
        """
        self.require_own_parameters("step()")
        loss = evaluate(closure)
        with in_step(self):
            if not self.mesh:
                self.wrapped.require_a_gradient()
            self.guards.before_step(self)
            # A worker whose gradient overflowed skips this step; all its ranks skip it.
            skips = overflowed(self, self.mesh.worker if self.mesh else ALONE)
            self.timer.phase("exchange")
            if self.mesh:
                self.mesh.reduce_gradients()
            if self.steps == 0:
                self._global.start()
            self.timer.phase("server")
            if not skips:
                self.wrapped.step()
            self.steps += 1
            try:
                with torch.autocast(self.device.type, enabled=False):
                    self.schedule.after_step(self.steps - 1, self._round, self.timer)
            except BaseException:
                self.steps -= 1  # the next step takes this round
                raise
            if self.buffers.shared and self.rounds.of(self.steps)[1] == 0:  # a round has ended
                self.average_buffers()
            self._share()
            self.unsent.steps = self.schedule.unsent(self.steps)
        return loss

    def _round(self, batches: Sequence[Batch], start: Start = Start.WHOLE) -> Stages:
        """A round of one bucket of layers: worker, server, worker.

        Args:
            batches: layers of the bucket.
            start: whole, or the message that a checkpoint held under way, which is sent again.
        """
        resend, to_servers = self.transport.resend, self.transport.to_servers
        if start is Start.TO_WORKERS:
            back = [batch.state["server_message"] for batch in batches]
            to_workers = partial(resend, self.transport.to_workers)
            self._at_workers(batches, (yield to_workers, batches, back))
            return
        if start is Start.TO_SERVERS:
            payloads = iter([batch.state["message"][:, : batch.up.size] for batch in batches])
            to_servers = partial(resend, to_servers)
        else:
            self.timer.phase("encode")
            payloads = map(self._worker_message, batches)
        yield from self._at_servers(batches, (yield to_servers, batches, [*payloads]))

    def _at_servers(self, batches: Sequence[Batch], from_workers: list) -> Stages:
        """The rest of a round; a message is freed as soon as it is in the mean."""
        payloads = (self._server_message(batch, from_workers.pop(0)) for batch in batches)
        self._at_workers(batches, (yield self.transport.to_workers, batches, [*payloads]))

    def _at_workers(self, batches: Sequence[Batch], shifts: Sequence[Tensor]) -> None:
        self.timer.phase("decode")
        for batch, shift in zip(batches, shifts, strict=True):
            move(self, batch, shift)
        self.last_sync = self.steps

    def _worker_message(self, batch: Batch) -> Tensor:
        """D_j = W - x_j + error_decay e_j;  returns R_j = C_j(D_j);  e_j = D_j - R_j."""
        local_models = batch.models()
        mark(batch.broken_at, ~finite(local_models), self.steps)
        wide = torch.promote_types(local_models.dtype, torch.float32)
        difference = (batch.state["global_params"].to(wide) - local_models).float()
        generator = self.generators["w2s"]
        message = batch.up.encode(difference, generator, self.error_decay, self.steps)
        if self.sync_delay:
            batch.state["departure"].copy_(local_models)
            batch.state["message"].copy_(message)
        return message

    def _mean(self, batch: Batch, messages: Sequence[Tensor]) -> Tensor | None:
        """g = mean of R_j of the layers owned here; None where no worker's message counts."""
        if not messages:
            return None
        mean = batch.state.get("server_gradient")  # EF21's G
        mean = batch.zeros(batch.owned) if mean is None else mean
        if self.mean == "senders" and add_mean_over_senders(batch.up.compressor, mean, messages):
            return mean
        if batch.serves:
            batch.up.add_mean(mean, messages)
        return mean

    def _server_message(self, batch: Batch, messages: Sequence[Tensor]) -> Tensor:
        """V = outer_momentum V + g;  returns S = C(outer_lr (g + outer_momentum V) + e_s)."""
        self.timer.phase("decode")
        mean = self._mean(batch, messages)
        self.timer.phase("server")
        if not batch.serves:
            return batch.nothing_owned()
        generator = self.generators["s2w"]
        if mean is None:  # W and V stay
            return batch.down.encode(batch.zeros(batch.owned), generator)
        direction, momentum = mean, batch.state.get("server_momentum")
        if momentum is not None:
            momentum.mul_(self.outer_momentum).add_(mean)
            direction = momentum
            if self.nesterov:
                # Not in one operation, which some processors would round only once.
                direction = mean + self.outer_momentum * momentum
        message = batch.down.encode(self.outer_lr * direction, generator, source=direction)
        if (kept := batch.state.get("server_message")) is not None:
            kept.copy_(message)
        return message

    @torch.no_grad()
    def final_sync(self) -> None:
        """Send the steps since the last round, so that W has all that the workers did.

        To be called at the end of training, on all workers together. Messages that are under way
        arrive first.

        Raises:
            RuntimeError: within `global_params()`.
        """
        self.require_own_parameters("final_sync()")
        if self.steps == 0 or (self.transport.heals and self.last_sync == self.steps):
            return
        self.schedule.flush(self.steps - 1, self._round, self.timer)
        if self.buffers.shared:
            self.average_buffers()
        self._share()
        self.unsent.steps = 0

    def _share(self) -> None:
        self.timer.phase("exchange")
        self._global.share()
        self.timer.phase(None)

    def global_params(self) -> AbstractContextManager[None]:
        """Within it the parameters are W, after it x_j again; on all ranks of a worker together.

        Within it `step`, `final_sync`, states, copies and checks are refused: they are of x_j.

        Raises:
            RuntimeError: within itself.

        Example:
            with optimizer.global_params():
                torch.save(model.state_dict(), "model.pt")
        """
        self.require_own_parameters("global_params()")
        return self._global.in_place(begun=self.steps > 0)

    @property
    def _swapped(self) -> bool:
        return self._global.swapped

    def check_finite(self) -> None:
        """Check that this worker's gradients and parameters are finite. Waits for the device.

        In a fleet nothing is checked: a worker whose message is not finite starts anew there.

        Raises:
            FloatingPointError: names the first layer and step that is not.
        """
        if self.transport.heals:
            return
        self.require_own_parameters("check_finite()")
        for optimizer in self.wrapped.ours:
            optimizer.check_finite()
        for batch in self.batches:
            norms = torch.stack(torch._foreach_norm(batch.params, float("inf")))
            mark(batch.broken_at, ~norms.isfinite(), self.steps or 1)
        super().check_finite()

    @torch.no_grad()
    def apply_messages(self, from_workers: list[list[Tensor]]) -> None:
        """Apply the messages of a round, per batch of layers, in which this worker sent none."""
        run([self._at_servers(self.batches, from_workers)], self.timer)
        self._share()

    def resume_after(self, steps: int) -> None:
        super().resume_after(steps)
        self.last_sync = steps
        self.unsent = self.unsent or UnsentSteps(self, self.transport.rank)
        self.unsent.steps = 0
        self.schedule.discard()
