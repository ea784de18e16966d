"""State of local steps: W, apart from the parameters x_j of a worker, and what rounds remember."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ef21_muon.channel import Channel, finite
from ef21_muon.compressors.base import require_marks
from ef21_muon.inner import Wrapped
from ef21_muon.layers import Batch
from ef21_muon.transport.buffers import Buffers
from ef21_muon.transport.mesh import WorkerMesh

if TYPE_CHECKING:
    from ef21_muon.local_steps import LocalSteps


class GlobalParams:
    """W of batches of layers, in their state's table "global_params", and how it moves.

    Args:
        batches: layers that this rank steps.
        wrapped: inner optimizers, which notice when their parameters are replaced.
        buffers: the model's averaged buffers, which change places with W.
        mesh: of workers of several ranks, whose shards follow the parameters; or None.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        wrapped: Wrapped,
        buffers: Buffers,
        mesh: WorkerMesh | None = None,
    ):
        self.batches, self.wrapped, self.buffers, self.mesh = batches, wrapped, buffers, mesh
        self.swapped = False

    def start(self) -> None:
        """Set W = x_j, as before the first step: a model may have been loaded until then."""
        for batch in self.batches:
            batch.state["global_params"].copy_(batch.models())

    def share(self) -> None:
        """Give the other ranks of this worker the layers that were stepped here."""
        if self.mesh:
            self.mesh.share_parameters()
        self.wrapped.take_over()

    @contextmanager
    def in_place(self, begun: bool) -> Iterator[None]:
        """Within it the parameters are W, and W's table has x_j.

        Args:
            begun: whether a step was taken; W is x_j before.
        """
        if self.mesh:
            self.mesh.gather_parameters()
        if not begun:
            self.start()
        self.wrapped.take_over()
        self._swap()
        try:
            yield
        finally:
            if self.mesh:
                self.mesh.gather_parameters()
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self.swapped = not self.swapped
        for batch in self.batches:
            batch.swap()
        self.buffers.swap()
        if self.mesh:
            self.mesh.share_parameters()
        self.wrapped.take_over(changed=False)


def move(optimizer: "LocalSteps", batch: Batch, message: Tensor) -> None:
    """W = W - S;  x_j = W, and keep the steps that x_j took since its message was made.

    A single worker with lossless messages and plain averages has W = x_j instead, where x_j is
    finite: W - (W - x_j) is x_j but for rounding.

    Args:
        optimizer: LocalSteps with its options.
        batch: layers, whose state has W and, with a sync_delay, x_j at the time of the message.
        message: S, encoded.
    """
    model, departure = batch.state["global_params"], batch.state.get("departure")
    shift = batch.down.decode(message)
    lossless = batch.up.compressor.lossless and batch.down.compressor.lossless
    average = optimizer.outer_lr == 1 and not optimizer.outer_momentum
    alone = optimizer.transport.ranks == 1 and not optimizer.transport.heals
    if alone and lossless and average:
        sent = batch.models() if departure is None else departure
        model.copy_(torch.where(~finite(sent)[:, None, None], model, sent))
        return
    model -= shift
    if departure is None:
        torch._foreach_copy_(batch.params, batch.as_parameters(model))
    else:
        torch._foreach_add_(batch.params, batch.as_parameters(model - departure))


def make_room(optimizer: "LocalSteps", batch: Batch) -> None:
    """Make room for W and e_j or G_j, and on the owner ranks for V, EF21's G and e_s.

    Args:
        optimizer: LocalSteps with its options and rules.
        batch: layers without state.
    """
    batch.keep("global_params", batch.models())
    rule, buffer = optimizer.rules[batch.group], "error"
    if optimizer.feedback == "ef21":
        buffer = "gradient_estimate"
        batch.keep("server_gradient")
    batch.send_with(rule["w2s"], optimizer.feedback, buffer)
    if optimizer.mean == "senders":
        require_marks(batch.up.compressor, *batch.shape)
    if optimizer.outer_momentum:
        batch.keep("server_momentum")
    if not batch.down.compressor.lossless:
        batch.down = Channel(rule["s2w"], batch.shape, "ef14", batch.keep("server_error"))


def keep_messages(batch: Batch, both_ways: bool) -> None:
    """Make room for messages that are under way between steps, and for the x_j that they are of.

    Args:
        batch: layers with W and channels.
        both_ways: whether servers send messages back.
    """
    batch.keep("departure", batch.state["global_params"].clone())
    layers, owned = len(batch.params), len(batch.params[batch.owned])
    message = torch.zeros(layers, batch.up.size, dtype=torch.uint8, device=batch.device)
    batch.keep("message", message)
    if both_ways:
        batch.keep("server_message", message.new_zeros(owned, batch.down.size))
