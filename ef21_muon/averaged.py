"""Any torch optimizer on the mean of the workers' gradients, for parameters that take no LMO."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ef21_muon.channel import still_where_broken
from ef21_muon.checks.arithmetic import of_inner
from ef21_muon.checks.guards import gradients_of, guarded_step
from ef21_muon.checks.renamed import refuses_renamed
from ef21_muon.checks.settings import (
    OUTER_NUMBERS,
    Compressors,
    check_number,
    choice,
    compressor_of,
    refuse_unused_decays,
    whole_number,
)
from ef21_muon.communicating import Communicating
from ef21_muon.compressors import Compressor
from ef21_muon.inner import Wrapped
from ef21_muon.layers import (
    FEEDBACK,
    Batch,
    entry_counts,
    in_buckets,
)
from ef21_muon.transport.fixed import Group, Stages, run
from ef21_muon.transport.mesh import WorkerMesh, together


class AveragedGradients(Communicating):
    """Any torch optimizer on the mean of the workers' gradients, sent in compressed messages.

    Muon is for hidden matrices, and often AdamW is for the rest: this is that AdamW on many
    workers, beside EF21Muon(hidden). All workers take the same steps of `inner`. A step is one
    round of EF21, without a momentum of its own:

        worker:   R_j = C_j(grad_j - G_j);  G_j = G_j + R_j
        server:   G = G + mean of R_j, sent back in float32
        worker:   a step of `inner` with G in place of the gradient

    After a step a parameter's gradient is G. Where all messages are lossless there is no feedback,
    and G is the mean gradient. Memory: 4 bytes per parameter for G_j, and 4 more for G on the rank
    that serves it.

    Args:
        inner: optimizer, or several of different parameters, that send nothing, as torch's own.
            `param_groups` are theirs, so schedulers act on their lr.
        w2s: compressor of messages to the servers, or its spec, as in `EF21Muon`; or a mapping from
            the names of parameter groups, their entry "name", to compressors, with one for every
            group. By default gradients are sent in float32.
        feedback: error feedback: "ef21" as above; "ef14", which sends C_j(grad_j + error_decay e_j)
            with e_j for what was lost; or "none".
        error_decay: share of "ef14"'s error that is kept per round, in [0, 1].
        server: which ranks serve the layers: "sharded", "rank0", "replicated", or "auto", as in
            `EF21Muon`.
        buckets: parts that layers are sent in, at least 1: one part travels while the next is
            encoded.
        missing_grad: what a parameter without a gradient is: an "error", or "zero" on this worker.
        buffers: the model, whose floating-point buffers become the mean of all workers' in every
            step; by default each worker keeps its own.
        seed: of random numbers in compressors, in which all ranks differ anyway.
        mesh: `WorkerMesh` of workers with several ranks; `inner` then holds `mesh.share(groups)`.
        process_group: of all workers, one rank each; by default torch's default group.

    Raises:
        ValueError: for options out of range, an inner optimizer that sends or needs a closure,
            parameters or settings that differ between ranks, and ranks that compute other bits of a
            step of `inner`.
        RuntimeError: from `step`, for a gradient that is missing or does not fit.

    Example:
        >>> layer = torch.nn.Linear(8, 8)
        >>> optimizer = AveragedGradients(torch.optim.AdamW(layer.parameters()), w2s="topk:0.1")
        >>> layer(torch.ones(8)).sum().backward()
        >>> optimizer.step()

    References:
        EF21: Richtarik et al., arXiv:2106.05203.
    """

    wrapped: Wrapped

    @refuses_renamed
    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        *,
        w2s: Compressors = "identity",
        feedback: str = "ef21",
        error_decay: float = 1.0,
        server: str = "auto",
        buckets: int = 4,
        missing_grad: str = "error",
        buffers: nn.Module | None = None,
        seed: int = 0,
        mesh: WorkerMesh | None = None,
        process_group: Group = None,
    ):
        whole_number("buckets", buckets, least=1)
        choice("feedback", feedback, FEEDBACK)
        self.error_decay = check_number("error_decay", error_decay, OUTER_NUMBERS)
        refuse_unused_decays([{"error_decay": self.error_decay, "server_momentum": 0}], feedback)
        with together(mesh):
            self.wrapped = Wrapped(inner)
            self.inner = self.wrapped.optimizers
            super().__init__(
                self.wrapped.param_groups,
                {},
                seed=seed,
                process_group=process_group,
                mesh=mesh,
                missing_grad=missing_grad,
                buffers=buffers,
            )
            self.rules = self.wrapped.take(self, w2s, "identity")
            costs = entry_counts(self.rules)
            batches = self.new_batches(server, costs, lambda server: of_inner(self.inner))
            lossless = all(batch.up.compressor.lossless for batch in batches)
            self.feedback = "none" if lossless else feedback
            self.forgetful = self.feedback != feedback
            for batch in batches:
                batch.send_with(self.rules[batch.group]["w2s"], self.feedback)
                batch.keep("server_gradient")
            self.begin(batches)
        self.buckets = in_buckets(batches, buckets)

    def exchange_compressor(self, w2s: Compressor | str, group: str | None = None) -> None:
        w2s = compressor_of("w2s", w2s)
        if self.forgetful and not w2s.lossless:
            raise ValueError(
                f"w2s={w2s} is not allowed after lossless messages, which leave no feedback state: "
                "build the optimizer with a lossy w2s, or with feedback='none'"
            )
        super().exchange_compressor(w2s, group)

    def step(self, closure: Callable | None = None) -> Any:
        """Take one round and one step of the inner optimizer, on all workers together.

        Args:
            closure: function that evaluates a batch, calls backward and returns the loss.

        Returns:
            The closure's loss, None without a closure.

        Raises:
            RuntimeError: on the rank whose gradient is missing or does not fit. Others wait, and
                report for whom: end the run, rather than skip a batch on one rank.
        """
        return guarded_step(self, closure, self._take_step)

    def _take_step(self) -> None:
        if self.mesh:
            self.timer.phase("exchange")
            self.mesh.reduce_gradients()
        run(map(self._round, self.buckets), self.timer)
        self.timer.phase("exchange")
        if self.buffers.shared:
            self.average_buffers()
        self.timer.phase("server")
        self.wrapped.step()
        self.timer.phase("exchange")
        if self.mesh:
            self.mesh.share_parameters()

    def _round(self, batches: Sequence[Batch]) -> Stages:
        """EF21 for one bucket of layers, whose mean gradients replace the gradients."""
        self.timer.phase("encode")
        payloads = []
        for batch in batches:
            gradients = torch.stack(gradients_of(batch, self.steps + 1))
            generator, step = self.generators["w2s"], self.steps + 1
            payloads.append(batch.up.encode(gradients, generator, self.error_decay, step))
        from_workers = yield self.transport.to_servers, batches, payloads
        self.timer.phase("decode")
        payloads = []
        for batch, messages in zip(batches, from_workers, strict=True):
            mean = batch.state["server_gradient"]
            if self.feedback != "ef21":
                mean.zero_()
            if batch.serves:
                batch.up.add_mean(mean, messages)
                payloads.append(batch.down.encode(still_where_broken(mean.clone(), mean)))
            else:
                payloads.append(batch.nothing_owned())
        means = yield self.transport.to_workers, batches, payloads
        self.timer.phase("decode")
        for batch, payload in zip(batches, means, strict=True):
            of_layers = batch.as_parameters(batch.down.decode(payload))
            held = [p.grad for p in batch.params if p.grad is not None]  # all have one
            for gradient, mean in zip(held, of_layers, strict=True):
                gradient.copy_(mean)
