"""Local steps: workers step by themselves, and exchange in rounds what has come of it."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ef21_muon.communicating import Communicating, together
from ef21_muon.compressors import Compressor, from_spec
from ef21_muon.compressors.base import add_mean_over_senders, require_marks
from ef21_muon.guards import evaluate, in_step, overflowed
from ef21_muon.inner import Wrapped
from ef21_muon.layers import (
    FEEDBACK,
    Batch,
    Channel,
    entry_counts,
    finite,
    in_buckets,
    mark,
)
from ef21_muon.renamed import refuses_renamed
from ef21_muon.settings import (
    OUTER_NUMBERS,
    Compressors,
    check_mean,
    check_number,
    choice,
    flag,
    refuse_unused_decays,
    whole_number,
)
from ef21_muon.transport.fixed import ALONE, Transport, run
from ef21_muon.transport.host import require_host
from ef21_muon.transport.mesh import WorkerMesh
from ef21_muon.transport.schedule import (
    RESEND_TO_SERVERS,
    RESEND_TO_WORKERS,
    WHOLE,
    Rounds,
    SyncSchedule,
)


class LocalSteps(Communicating):
    """Workers take `sync_every` steps of an inner optimizer, and then average what these have changed.

    DiLoCo (Douillard et al., arXiv:2311.08105) around any torch optimizer, with compressed messages
    (MuLoCo, arXiv:2505.23725; SparseLoCo, arXiv:2508.15706) and the servers of EF21Muon. After
    `sync_every` calls of `step()` comes a round:

        worker:   D_j = W - x_j + error_decay e_j;  R_j = C_j(D_j);  e_j = D_j - R_j
        server:   g = mean of R_j;  V = outer_momentum V + g
                  S = C(outer_lr (g + outer_momentum V) + e_s);  e_s = what S lost
        worker:   W = W - S;  x_j = W

    with outer_lr V in place of the sum without `nesterov`. The parameters are this worker's x_j;
    `global_params()` puts W in their place, bit-identical on all workers, to be evaluated and saved.

    sync_every: a number of steps, or {first step: number} where rounds change, as {0: 120, 360: 60}.
    inner: an optimizer, or several of different parameters, that sends nothing, as torch's own, or
    EF21Muon with process_group=ALONE. `param_groups` are theirs, so schedulers act on their lr.
    w2s, s2w: as in EF21Muon, or a mapping from the names of groups. `feedback`: "ef14" as above;
    "ef21", R_j = C_j(W - x_j - G_j), G_j = G_j + R_j, g = g + mean of R_j; or "none". `server` and
    `buckets` are as in EF21Muon. mean: "all" as above, or with sparse messages "senders", where g
    has of every entry the mean over the workers that have sent it (SparseLoCo), 0 where none has.
    buffers: as in EF21Muon, in every round; within `global_params()` they are those of the last one.

    With `streaming` every batch of layers has a turn of its own in the round, so that a link is used
    evenly, and with `sync_delay` a message travels for as many steps each way while the training goes on
    (Streaming DiLoCo, arXiv:2501.18512): x_j then moves by W less the x_j of the turn, which keeps
    the steps since. A delay is for gloo, or messages through the host: NCCL would hold the device.

    mesh: of workers of several ranks: gradients are averaged inside of a worker in every step, and
    inner optimizers hold the parameters of `mesh.share(groups)`. A root of `fully_shard` needs
    reshard_after_forward=True, or it computes with W after `global_params()`. There a parameter without a
    gradient is refused, or zero where its inner optimizer has missing_grad="zero". transport: a fleet
    (`ef21_muon.fleet`), for workers that come and go.

    Memory: W and e_j, 8 bytes for each float32 parameter; on the rank that serves it 4 for V, and 4
    for e_s where s2w loses anything. A delay takes 4 more and the messages under way.

    A worker alone with lossless messages, an `outer_lr` of 1 and no momentum is its inner
    optimizer. Raises ValueError for options out of range, for an inner optimizer that sends, or
    needs a closure, or whose state is not made of float tensors, and where ranks get other bits of
    the same messages; RuntimeError from `step` where no parameter has a gradient.
    """

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
        process_group: dist.ProcessGroup | str | None = None,
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
            server = transport.require_options(
                server=server,
                streaming=streaming,
                sync_delay=sync_delay,
                feedback=feedback,
                buffers=buffers,
            )
        place = {"process_group": process_group, "mesh": mesh, "transport": transport}
        with together(mesh):
            self.wrapped = Wrapped(inner)
            self.inner = self.wrapped.optimizers
            super().__init__(self.wrapped.param_groups, {}, seed=seed, buffers=buffers, **place)
            if sync_delay and self.ranks > 1:
                require_host(self.process_group, self.device, f"sync_delay={sync_delay}")
            self.rules = self.wrapped.take(self, w2s, s2w)
            batches = self.new_batches(server, entry_counts(self.rules))
            for batch in batches:
                self._make_room(batch)
            most = 1 if self.transport.heals else buckets
            self.buckets = [[b] for b in batches] if streaming else in_buckets(batches, most)
            self.schedule = SyncSchedule(self.buckets, self.rounds, sync_delay, streaming)
            for batch in batches if sync_delay else ():
                self._keep_messages(batch)
            # Where an inner optimizer skips what has no gradient, several ranks cannot.
            self.begin(batches, self.wrapped.layers(batches, "error" if mesh else "skip"))
        self.last_sync = 0  # local steps until the last round
        self.transport.attach(self)

    def _make_room(self, batch: Batch) -> None:
        """For the state: W, e_j or G_j and, of the servers, V, EF21's G and e_s."""
        batch.keep("global_params", batch.models())
        rule, buffer = self.rules[batch.group], "error"
        if self.feedback == "ef21":
            buffer = "gradient_estimate"
            batch.keep("server_gradient")
        batch.send_with(rule["w2s"], self.feedback, buffer)
        if self.mean == "senders":
            require_marks(batch.up.compressor, *batch.shape)
        if self.outer_momentum:
            batch.keep("server_momentum")
        if not batch.down.compressor.lossless:
            batch.down = Channel(rule["s2w"], batch.shape, "ef14", batch.keep("server_error"))

    def _keep_messages(self, batch: Batch) -> None:
        """Room for messages under way between steps, and the x_j that the first was made of."""
        batch.keep("departure", batch.state["global_params"].clone())
        layers, served = len(batch.params), len(batch.params[batch.owned])
        message = torch.zeros(layers, batch.up.size, dtype=torch.uint8, device=batch.device)
        batch.keep("message", message)
        if self.schedule.directions == 2:
            batch.keep("server_message", message.new_zeros(served, batch.down.size))

    def exchange_compressor(self, w2s: Compressor | str, group: str | None = None) -> None:
        if self.transport.heals:
            raise ValueError("a compressor is not exchanged in a fleet: begin another run with it")
        if self.streaming and self.rounds.of(self.steps)[1]:
            raise ValueError(
                f"a compressor is not exchanged after step {self.steps}, in a round in which some "
                "layers were sent: do so after its last step"
            )
        w2s = from_spec(w2s)
        if self.mean == "senders":
            for batch in self.batches:
                require_marks(w2s.fit(*batch.shape), *batch.shape)
        super().exchange_compressor(w2s, group)
        self.schedule = SyncSchedule(self.buckets, self.rounds, self.sync_delay, self.streaming)

    @property
    def under_way(self) -> list[Batch]:
        """The batches whose messages have not come to the servers."""
        return self.schedule.undelivered(self.steps)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """A step of the inner optimizer, and what is due after it of a round."""
        self.require_own_parameters("step()")
        loss = evaluate(closure)
        with in_step(self):
            if not self.mesh:
                self.wrapped.require_a_gradient()
            self.guards.before_step(self)
            # A worker whose gradient overflowed does without this step; its own ranks do alike.
            does_without = overflowed(self, self.mesh.worker if self.mesh else ALONE)
            self.timer.phase("exchange")
            if self.mesh:
                self.mesh.reduce_gradients()
            self._take_over()
            self.timer.phase("server")
            if not does_without:
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
        return loss

    def _round(self, batches: Sequence[Batch], start: int = WHOLE) -> Generator:
        """A round of a bucket of batches: worker, server, worker.

        start: WHOLE, or the message which it begins with resending, after a restart from a
            checkpoint that holds it.
        """
        resend, to_servers = self.transport.resend, self.transport.to_servers
        if start == RESEND_TO_WORKERS:
            payloads = [batch.state["server_message"] for batch in batches]
            to_workers = partial(resend, self.transport.to_workers)
            return self._at_workers(batches, (yield to_workers, batches, payloads))
        if start == RESEND_TO_SERVERS:
            payloads = (batch.state["message"][:, : batch.up.size] for batch in batches)
            to_servers = partial(resend, to_servers)
        else:
            self.timer.phase("encode")
            payloads = map(self._worker_message, batches)
        yield from self._at_servers(batches, (yield to_servers, batches, [*payloads]))

    def _at_servers(self, batches: Sequence[Batch], from_workers: list) -> Generator:
        """The rest of a round; messages are let go of as soon as they are in a mean."""
        payloads = (self._served(batch, from_workers.pop(0)) for batch in batches)
        self._at_workers(batches, (yield self.transport.to_workers, batches, [*payloads]))

    def _served(self, batch: Batch, messages: Sequence[Tensor]) -> Tensor:
        self.timer.phase("decode")
        mean = self._mean(batch, messages)
        self.timer.phase("server")
        return self._server_message(batch, mean)

    def _at_workers(self, batches: Sequence[Batch], shifts: Sequence[Tensor]) -> None:
        self.timer.phase("decode")
        for batch, shift in zip(batches, shifts, strict=True):
            self._update(batch, batch.down.decode(shift))
        self.last_sync = self.steps

    def _worker_message(self, batch: Batch) -> Tensor:
        """D_j = W - x_j + error_decay e_j;  R_j = C_j(D_j);  e_j = D_j - R_j."""
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
        """g = mean of R_j, of the layers owned here; None where no worker's message counts."""
        if not messages:
            return None
        mean = batch.state.get("server_gradient")  # EF21's G
        mean = batch.zeros(batch.owned) if mean is None else mean
        if self.mean == "senders" and add_mean_over_senders(batch.up.compressor, mean, messages):
            return mean
        if batch.serves:
            batch.up.add_mean(mean, messages)
        return mean

    def _server_message(self, batch: Batch, mean: Tensor | None) -> Tensor:
        """V = outer_momentum V + g;  S = C(outer_lr (g + outer_momentum V) + e_s)."""
        if not batch.serves:
            return batch.nothing_owned()
        generator = self.generators["s2w"]
        if mean is None:  # W stays, and V
            return batch.down.encode(batch.zeros(batch.owned), generator)
        direction, momentum = mean, batch.state.get("server_momentum")
        if momentum is not None:
            momentum.mul_(self.outer_momentum).add_(mean)
            direction = momentum
            if self.nesterov:
                direction = mean + self.outer_momentum * momentum  # not fused, as some would
        message = batch.down.encode(self.outer_lr * direction, generator, source=direction)
        if (kept := batch.state.get("server_message")) is not None:
            kept.copy_(message)
        return message

    def _update(self, batch: Batch, received: Tensor) -> None:
        """W = W - S;  x_j = W, but for the steps since the message was made."""
        model, departure = batch.state["global_params"], batch.state.get("departure")
        if self._is_its_inner(batch):
            sent = batch.models() if departure is None else departure
            model.copy_(torch.where(~finite(sent)[:, None, None], model, sent))
            return
        model -= received
        if departure is None:
            torch._foreach_copy_(batch.params, batch.as_parameters(model))
        else:
            torch._foreach_add_(batch.params, batch.as_parameters(model - departure))

    def _is_its_inner(self, batch: Batch) -> bool:
        """Whether W of a worker alone is its x_j, which W - (W - x_j) is but for rounding."""
        lossless = batch.up.compressor.lossless and batch.down.compressor.lossless
        average = self.outer_lr == 1 and not self.outer_momentum
        return self.transport.ranks == 1 and not self.transport.heals and lossless and average

    @torch.no_grad()
    def final_sync(self) -> None:
        """Send the steps since the last round too: W then has all that the workers did.

        For the end of a training, on all workers together. What is under way arrives first.
        """
        self.require_own_parameters("final_sync()")
        if self.steps == 0 or (self.transport.heals and self.last_sync == self.steps):
            return
        self.schedule.flush(self.steps - 1, self._round, self.timer)
        if self.buffers.shared:
            self.average_buffers()
        self._share()

    def _share(self) -> None:
        """Give the other ranks of this worker the layers that were stepped here."""
        self.timer.phase("exchange")
        if self.mesh:
            self.mesh.share_parameters()
        self.timer.phase(None)
        self.wrapped.take_over()

    def _take_over(self) -> None:
        """W = x_j before the first step: a model may have been loaded since this was built."""
        for batch in self.batches if self.steps == 0 else ():
            batch.state["global_params"].copy_(batch.models())

    @contextmanager
    def global_params(self):
        """Within it the parameters are W; after it x_j again. On all ranks of a worker together.

        Within it `step`, `final_sync`, states, copies and checks are refused: they are of x_j.
        """
        self.require_own_parameters("global_params()")
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self.mesh:
            self.mesh.gather_parameters()
        if not self._swapped:
            self._take_over()
            self.wrapped.take_over()
        self._swapped = not self._swapped
        for batch in self.batches:
            batch.swap()
        self.buffers.swap()
        if self.mesh:
            self.mesh.share_parameters()
        self.wrapped.take_over(changed=False)

    def check_finite(self) -> None:
        """Raise FloatingPointError if a gradient or a parameter of this worker is not finite.

        Names the layer and the step. Waits for the device. In a fleet nothing: there a worker whose
        message is not finite begins anew with the next round.
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
        """Apply a round of the other workers: their messages, per batch, without one of this worker."""
        run([self._at_servers(self.batches, from_workers)], self.timer)
        self._share()

    def go_on_after(self, steps: int) -> None:
        super().go_on_after(steps)
        self.last_sync = steps
        self.schedule.discard()
