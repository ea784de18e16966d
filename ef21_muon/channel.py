"""Channels: the messages of layers in one direction, with a compressor and error feedback."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ef21_muon.compressors.base import Compressor


class Channel:
    """One direction of a batch's messages: a compressor and the error feedback around it.

    It compresses d, which depends on the feedback and on the `target` (layers, m, n):

        "ef21"  d = target - G_j,        then  G_j <- G_j + C(d)   lines 10 and 11 of Algorithm 1
        "ef14"  d = target + decay e_j,  then  e_j <- d - C(d)
        "none"  d = target

    The receiver of "ef21" adds messages up; with the others each message replaces the last one.
    EF14 does not multiply e_j by a step size, since an LMO does not depend on the scale of G (an
    AdaptiveRadius does). With ||C(d) - d||^2 <= (1 - alpha) ||d||^2 and a decay below 1, ||e_j||^2
    is at most (1 - alpha) / ((1 - decay) (1 - (1 - alpha) decay)) times the largest ||target||^2.

    Args:
        compressor: the compressor, which `use` fits to the shape.
        shape: (m, n) of the layers.
        feedback: "ef21", "ef14" or "none" (default).
        buffer: the error-feedback buffer, G_j or e_j, float32 (layers, m, n), zero at first;
            None (default) for feedback="none".
        broken_at: int64 (layers,), for each layer the first step, counted from 1, whose message
            was not finite, or 0; None (default) if nobody asks.

    Attributes:
        size: the bytes of one layer's message.
        recording: whether `encode` records the two tensors below, False at first.
        contraction: 1 - ||C(d) - d||^2 / ||d||^2 of the last message, (layers,).
        estimator_error: ||target - estimate|| / ||target|| of the last message, (layers,).

    Example:
        >>> from ef21_muon.compressors import TopK
        >>> channel = Channel(TopK(0.5), (1, 2), "ef14", torch.zeros(1, 1, 2))
        >>> for _ in range(3):  # what is lost is sent later
        ...     print(channel.decode(channel.encode(torch.tensor([[[3.0, 2.0]]]))))
        tensor([[[3., 0.]]])
        tensor([[[0., 4.]]])
        tensor([[[6., 0.]]])

    References:
        EF21: Richtarik et al. (arXiv:2106.05203). EF14: Seide et al. (2014). The decay of its
        error: Wu et al. (arXiv:1806.08054).
    """

    def __init__(
        self,
        compressor: Compressor,
        shape: tuple[int, int],
        feedback: str = "none",
        buffer: Tensor | None = None,
        broken_at: Tensor | None = None,
    ):
        self.shape = shape
        self.use(compressor)
        self.feedback, self.buffer, self.broken_at = feedback, buffer, broken_at
        self.recording = False
        self.contraction: Tensor | None = None
        self.estimator_error: Tensor | None = None

    def use(self, compressor: Compressor) -> None:
        """Set the compressor for the next messages, fitted to the shape."""
        self.compressor = compressor.fit(*self.shape)
        self.size = self.compressor.payload_bytes(*self.shape)

    def encode(
        self,
        target: Tensor,
        generator: Generator | None = None,
        decay: float = 1.0,
        step: int = 0,
        source: Tensor | None = None,
    ) -> Tensor:
        """Return the messages, and update the error-feedback buffer.

        Args:
            target: float32 (layers, m, n).
            generator: the source of the compressor's random numbers; default None, which is torch's
                global generator.
            decay: the weight of e_j for "ef14", in [0, 1]; default 1.
            step: the number to note in `broken_at`.
            source: float32 (layers, m, n), from which `target` was made; a layer whose source is
                not finite sends zeros, and `target` is changed. Default None: all is sent.

        Returns:
            uint8 (layers, size).
        """
        difference = target
        if self.buffer is not None:
            if self.feedback == "ef21":
                difference = target - self.buffer
            elif source is None:
                difference = torch.add(target, self.buffer, alpha=decay)
            else:
                difference = target.add_(self.buffer, alpha=decay)
        if source is not None:
            still_where_broken(difference, source)
        message = self.compressor.encode(difference, generator)
        if self.buffer is None and self.broken_at is None:
            return message
        sent = self.decode(message)
        if self.broken_at is not None:
            mark(self.broken_at, ~finite(sent), step)
        if self.buffer is not None:
            if self.feedback == "ef21":
                self.buffer += sent
            else:
                self.buffer.copy_(difference).sub_(sent)
        if self.recording:
            known = self.buffer if self.feedback == "ef21" and self.buffer is not None else sent
            self.contraction = 1 - relative_error(sent, difference).square_()
            self.estimator_error = relative_error(known, target)
        return message

    def decode(self, message: Tensor) -> Tensor:
        """Return what messages uint8 (layers, size) hold, float32 (layers, m, n)."""
        return self.compressor.decode(message, *self.shape)

    def add_mean(self, total: Tensor, messages: Sequence[Tensor]) -> None:
        """Add the mean of all workers' messages to `total` (layers, m, n), in place."""
        for message in messages:
            total += self.decode(message) * (1 / len(messages))  # not fused


def finite(matrices: Tensor) -> Tensor:
    """Return for every matrix of a batch (L, m, n) whether all of its entries are finite."""
    return matrices.amax((1, 2)).isfinite() & matrices.amin((1, 2)).isfinite()


def still_where_broken(change: Tensor, source: Tensor) -> Tensor:
    """Return `change` (L, m, n), set to zero in place for layers whose `source` is not finite."""
    return change.masked_fill_(~finite(source)[:, None, None], 0)


def mark(at: Tensor, broken: Tensor, step: int) -> None:
    """Note the step in `at` (L,) for layers that are `broken`, unless an earlier step is there."""
    at.masked_fill_(broken & (at == 0), step)


def relative_error(estimate: Tensor, of: Tensor) -> Tensor:
    """Return ||estimate - of|| / ||of|| for matrices (L, m, n), and 0 if both are zero."""
    error = torch.linalg.matrix_norm(estimate - of)
    return torch.where(error == 0, 0.0, error / torch.linalg.matrix_norm(of))
