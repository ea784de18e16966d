"""Channels: messages of layers in one direction, with a compressor and error feedback."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ef21_muon.compressors.base import Compressor


class Channel:
    """One direction of a batch's messages: a compressor, and feedback of what it has lost.

    What is compressed of a `target` (layers, m, n) is, with the feedback

        "ef21"  d = target - G_j,        then  G_j <- G_j + C(d)   lines 10 and 11 of Algorithm 1
        "ef14"  d = target + decay e_j,  then  e_j <- d - C(d)     Seide et al. (2014)
        "none"  d = target

    EF21 is from Richtarik et al., arXiv:2106.05203. The receiver of "ef21" adds messages up, that
    of the others has in each all that there is to know. In EF14 the step size does not enter the
    error, since an LMO does not see the scale of G (an AdaptiveRadius does). The decay of its error
    is from Wu et al., arXiv:1806.08054: where ||C(d) - d||^2 <= (1 - alpha) ||d||^2, ||e_j||^2 is
    at most (1 - alpha) / ((1 - decay) (1 - (1 - alpha) decay)) of the largest ||target||^2.

    buffer: G_j or e_j, float32 like the target, at first zero; None without feedback. `size` is the
    bytes of a layer's message. `broken_at` (layers,) is the first step whose message was not
    finite, counted from 1, or 0. While `recording`, `contraction` and `estimator_error` (layers,)
    are those of the last message.
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
        """Send with this one from here on, fitted to the shape."""
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
        """The messages, uint8 (layers, size), and what is remembered of them.

        step: for `broken_at`; source: of layers where it is not finite nothing is sent, and
        `target`, which was made of it, may be changed.
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
            known = self.buffer if self.feedback == "ef21" else sent
            self.contraction = 1 - relative_error(sent, difference).square_()
            self.estimator_error = relative_error(known, target)
        return message

    def decode(self, message: Tensor) -> Tensor:
        """uint8 (layers, size) -> float32 (layers, m, n)."""
        return self.compressor.decode(message, *self.shape)

    def add_mean(self, total: Tensor, messages: Sequence[Tensor]) -> None:
        """Add the mean of all workers' messages to `total` (layers, m, n)."""
        for message in messages:
            total += self.decode(message) * (1 / len(messages))  # rounded twice


def finite(matrices: Tensor) -> Tensor:
    """Whether all entries of a matrix are, for every one of a batch (L, m, n)."""
    return matrices.amax((1, 2)).isfinite() & matrices.amin((1, 2)).isfinite()


def still_where_broken(change: Tensor, source: Tensor) -> Tensor:
    """`change` (L, m, n), in place, but none of layers of whose `source` not all is finite."""
    return change.masked_fill_(~finite(source)[:, None, None], 0)


def mark(at: Tensor, broken: Tensor, step: int) -> None:
    """Note in `at` (L,) the step of layers that are `broken`, but where it has an earlier one."""
    at.masked_fill_(broken & (at == 0), step)


def relative_error(estimate: Tensor, of: Tensor) -> Tensor:
    """||estimate - of|| / ||of|| for every matrix of a batch (L, m, n); 0 where both are zero."""
    error = torch.linalg.matrix_norm(estimate - of)
    return torch.where(error == 0, 0.0, error / torch.linalg.matrix_norm(of))
