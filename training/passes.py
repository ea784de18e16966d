"""Forward and backward passes of a run's model on this worker."""

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


class Passes:
    """The losses and gradients of a model, as its optimizer needs them.

    What is called, `model`, is `raw_model` behind DDP where the optimizer's gradients are
    all-reduced. precision: of PRECISIONS, "bfloat16" by autocast; compiled: of COMPILE, whether by
    torch.compile. "auto" is bfloat16 and compiled on a GPU, neither on CPUs. max_norm: of a
    worker's gradient, which is clipped to it (of all-reduced ones, the mean is), or None.
    `without_sync()`: within it gradients are neither all-reduced nor, of a sharded model, reduced
    and scattered: a rank keeps them whole until they are. `twice`: whether the optimizer evaluates
    every batch by itself, at two W; both gradients are clipped. Raises RunError where CPUs have no
    compiler.
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
        # W is evaluated, where a worker's own parameters are apart from it.
        self.global_params = optimizer.global_params
        self.twice = optimizer.correction is not None
        self.max_norm = max_norm
        if optimizer.mesh:  # which averages over a worker's ranks first
            optimizer.mesh.max_norm, self.max_norm = max_norm, None

    def gradient(self, batch: list[list[Tensor]]) -> Tensor:
        """Leave the gradient of a batch, of passes of equal size, in `grad`; its mean loss, ()."""
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
            of_all = (parameter.grad for parameter in self.raw_model.parameters())
            clip([one for one in of_all if one is not None], self.max_norm)
        return total

    @torch.no_grad()
    def loss_sum(self, batches: Iterable[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, int]:
        """The sum of W's losses over all tokens that count, (), and how many these are.

        batches: inputs, targets, and how many tokens count.
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
    """Within it a backward pass of a sharded model leaves its gradients for the next one."""
    try:
        model.set_requires_gradient_sync(False)
        model.set_is_last_backward(False)
        yield
    finally:
        model.set_requires_gradient_sync(True)
        model.set_is_last_backward(True)


def _compile_parts(model: GPT) -> None:
    """Compile a sharded model in place, but for what fully_shard does before and after a module.

    Of that a graph would be cut in pieces. All blocks share one.
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
