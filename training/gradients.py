"""Losses and gradients of a run's model on this worker: forward and backward passes."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from baselines import AllReduced
from ef21_muon.transport.clipping import clip
from ef21_muon.transport.shards import is_sharded
from model import GPT
from training.workers import RunError

PRECISIONS = ("auto", "float32", "bfloat16")
COMPILE = ("auto", True, False)


class GradientComputation:
    """Computes the losses and gradients of a model, as its optimizer needs them.

    `model` is what is called: `raw_model`, behind DDP if the optimizer's gradients are all-reduced.
    `needs_closure` says whether the optimizer itself evaluates every batch, at two W: then its
    step takes `compute` as a closure, and both gradients are clipped. Inside `without_sync()`
    gradients are not all-reduced, and those of a sharded model are not reduced and scattered: a
    rank keeps them whole until a later pass does so.

    Args:
        raw_model: the model, whole or sharded.
        optimizer: the optimizer that steps it.
        device: the device of the model.
        precision: one of PRECISIONS. "bfloat16" is by autocast; "auto" is bfloat16 on a GPU and
            float32 on CPUs.
        compiled: one of COMPILE, whether torch.compile is used. "auto" is True on a GPU alone.
        max_norm: the norm to which a worker's gradient is clipped, or None. All-reduced gradients
            are clipped after their mean has been taken.

    Raises:
        RunError: if CPUs have no compiler.
    """

    def __init__(
        self,
        raw_model: GPT,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str,
        compiled: str | bool,
        max_norm: float | None = None,
    ):
        self.raw_model, self.optimizer, self.device = raw_model, optimizer, device
        on_cuda, sharded = device.type == "cuda", any(map(is_sharded, raw_model.parameters()))
        self.model, self.without_sync = raw_model, nullcontext
        if isinstance(optimizer, AllReduced):
            self.model = optimizer.wrap(raw_model)
            self.without_sync = self.model.no_sync
        elif sharded:
            self.without_sync = partial(_without_scatter, raw_model)
        if on_cuda if compiled == "auto" else compiled:
            if not on_cuda:
                _require_compiler()
            if sharded:
                _compile_parts(raw_model)
            else:
                self.model = torch.compile(self.model, dynamic=False)
        in_half = on_cuda if precision == "auto" else precision == "bfloat16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_half)
        # A worker's own parameters may differ from W, which is evaluated.
        self.global_params = optimizer.global_params
        self.needs_closure = optimizer.correction is not None
        self.max_norm = max_norm
        if optimizer.mesh:  # the mesh averages over a worker's ranks first, then clips
            optimizer.mesh.max_norm, self.max_norm = max_norm, None

    def compute(self, batch: list[list[Tensor]]) -> Tensor:
        """Compute the gradient of a batch, and leave it in `grad`.

        Args:
            batch: inputs and targets of every forward pass; all passes have equal size.

        Returns:
            The mean loss of the batch, of shape ().
        """
        self.raw_model.zero_grad()
        passes = len(batch)
        total = torch.zeros((), device=self.device)
        for number, (inputs, targets) in enumerate(batch, 1):
            sync = nullcontext() if number == passes else self.without_sync()
            with self.optimizer.timer("forward_backward"), sync:
                with self.autocast:
                    loss = self.model(inputs, targets) / passes
                loss.backward()
                total += loss.detach()
        if self.max_norm is not None:
            gradients = (parameter.grad for parameter in self.raw_model.parameters())
            clip([one for one in gradients if one is not None], self.max_norm)
        return total

    @torch.no_grad()
    def loss_sum(self, batches: Iterable[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, int]:
        """The sum of W's losses over all tokens that count.

        Args:
            batches: inputs, targets, and how many tokens of them count.

        Returns:
            The sum, of shape (), and the number of tokens that count.
        """
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with self.global_params():
            for inputs, targets, counted in batches:
                with self.autocast:
                    total += self.model(inputs, targets).double() * counted
                tokens += counted
        return total, tokens


@contextmanager
def _without_scatter(model: GPT) -> Iterator[None]:
    """Inside it, a backward pass of a sharded model leaves its gradients to the next pass."""
    try:
        model.set_requires_gradient_sync(False)
        model.set_is_last_backward(False)
        yield
    finally:
        model.set_requires_gradient_sync(True)
        model.set_is_last_backward(True)


def _compile_parts(model: GPT) -> None:
    """Compile a sharded model in place, except what fully_shard does before and after a module.

    That would cut a graph into pieces. All blocks share one graph.
    """
    for module, name in (model, "embed"), (model, "head"), *((b, "forward") for b in model.blocks):
        setattr(module, name, torch.compile(getattr(module, name), dynamic=False))


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        raise RunError(
            f"compile=true on CPUs needs a C++ compiler, and {compiler} was not found: install it, "
            "name another in the environment variable CXX, or give compile=false"
        )
