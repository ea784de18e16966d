"""Floating-point buffers of a model, as running statistics are: workers share their mean."""

import gc
import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _NormBase

from ef21_muon.layers import Layer
from ef21_muon.transport.fixed import Group, Traffic, gathered, packed

log = logging.getLogger("ef21_muon")


class Buffers:
    """The buffers of `module` that its state has; integer ones are left to every worker.

    `shared` is, by name, what all workers of the group share: the mean of the last round, at first
    the buffers as they are. Without a module there are none. Raises ValueError for what is no
    module.
    """

    def __init__(self, module: nn.Module | None, group: Group):
        if not isinstance(module, nn.Module | None):
            raise ValueError(
                f"buffers={type(module).__name__} is not allowed: give the model, or the part of it"
                " whose buffers are to be averaged"
            )
        self.module, self.group = module, group
        kept, named = (module.state_dict(), module.named_buffers()) if module else ((), ())
        self.shared = {
            name: one.clone() for name, one in named if name in kept and one.is_floating_point()
        }

    def __str__(self) -> str:
        return f"{sum(one.numel() for one in self.shared.values())} in {len(self.shared)} tensors"

    @torch.no_grad()
    def average(self) -> Traffic:
        """The mean of all workers' on every one of them, by an all-gather; what that takes.

        What is the same on all stays so to the bit, as tables of constants; what would no longer be
        finite stays as it was.
        """
        if not self.shared:
            return Traffic()
        mine = packed(self._present())
        of_ranks = gathered(mine, self.group)
        mean = torch.where((of_ranks == of_ranks[0]).all(0), of_ranks[0], of_ranks.mean(0))
        former = packed(self.shared.values())
        mean = torch.where(former.isfinite() & ~mean.isfinite(), former, mean)
        parts = mean.split([one.numel() for one in self.shared.values()])
        for part, shared, own in zip(parts, self.shared.values(), self._present(), strict=True):
            shared.copy_(part.view_as(shared))
            own.copy_(shared)
        others = (len(of_ranks) - 1) * mine.nbytes
        return Traffic(mine.nbytes, 0, others, others)

    @torch.no_grad()
    def swap(self) -> None:
        """Put what workers share in place of this worker's own, and back."""
        for shared, own in zip(self.shared.values(), self._present(), strict=True):
            before = own.clone()
            own.copy_(shared)
            shared.copy_(before)

    def state(self) -> dict[str, Tensor]:
        """What workers share, as copies."""
        return {name: shared.clone() for name, shared in self.shared.items()}

    def require_fit(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError for the state of other buffers."""
        here, there = ({n: tuple(t.shape) for n, t in one.items()} for one in (self.shared, state))
        if here != there:
            raise ValueError(
                f"the state holds buffers {there} where this optimizer averages {here}: build it "
                "with the same buffers"
            )

    def load(self, state: dict[str, Tensor]) -> None:
        """What workers share, from a state that fits."""
        for name, shared in self.shared.items():
            shared.copy_(state[name])

    def _present(self) -> list[Tensor]:
        """The module's own, which may be others than before, as after moving it."""
        return [self.module.get_buffer(name) for name in self.shared]


def instances(kind: type) -> list:
    """All objects of a class, looked for among what refers to it.

    To ask every object for its class takes five times as long.
    """
    kinds = [kind]
    for one in kinds:  # which grows
        kinds += one.__subclasses__()
    return [one for one in gc.get_referrers(*kinds) if issubclass(type(one), kind)]


def warn_of_statistics(layers: Sequence[Layer], averaged: nn.Module | None) -> None:
    """Log, on rank 0, whose running statistics stay each worker's own; as `own_statistics`."""
    parted = own_statistics(layers, averaged)
    if parted and dist.get_rank() == 0:
        more = f" (and {len(parted) - 1} more)" if len(parted) > 1 else ""
        log.warning(
            "the running statistics of %s%s stay each worker's own, and so what the model makes of "
            "a batch in eval(): give buffers=model, which averages them in every round, or convert "
            "to SyncBatchNorm",
            parted[0], more,
        )  # fmt: skip


def own_statistics(layers: Sequence[Layer], averaged: nn.Module | None) -> list[str]:
    """The modules with running statistics beside the trained layers, by name.

    But for those in `averaged`, and SyncBatchNorm, which has the same on all workers by itself.
    """
    known = {id(module) for module in averaged.modules()} if averaged else set()
    parted = {
        id(module)
        for module in instances(_NormBase)
        if module.track_running_stats and not isinstance(module, SyncBatchNorm)
        if id(module) not in known
    }
    if not parted:
        return []
    trained = {id(layer.parameter) for layer in layers}
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    models = [m for m in modules if any(id(one) in trained for one in m.parameters())]
    named = {}  # by the largest model, so that comes first
    for model in sorted(models, key=lambda model: -len([*model.modules()])):
        for name, module in model.named_modules():
            if id(module) in parted:
                named.setdefault(id(module), name or type(module).__name__)
    return sorted(named.values())
