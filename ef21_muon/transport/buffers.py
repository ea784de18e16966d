"""A model's floating-point buffers, such as running statistics, averaged over the workers."""

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
    """Averages the floating-point buffers in a module's state; every worker keeps integer ones.

    Args:
        module: whose buffers are averaged; with None there are none.
        group: the ranks that average.

    Attributes:
        shared: by name the values that all workers share: the mean of the last round, and at first
            the buffers as they are.

    Raises:
        ValueError: if `module` is no module.
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
        """Set the buffers of every worker to their mean, by an all-gather.

        Entries that are the same on all workers, as in tables of constants, keep their bits.
        Entries whose mean is no longer finite keep the value of the round before.

        Returns:
            The bytes that this took.
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
        """Exchange this worker's own values and the shared ones."""
        for shared, own in zip(self.shared.values(), self._present(), strict=True):
            before = own.clone()
            own.copy_(shared)
            shared.copy_(before)

    def state(self) -> dict[str, Tensor]:
        """Copies of the shared values, by name."""
        return {name: shared.clone() for name, shared in self.shared.items()}

    def require_fit(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError if the state is that of other buffers."""
        here, there = ({n: tuple(t.shape) for n, t in one.items()} for one in (self.shared, state))
        if here != there:
            raise ValueError(
                f"the state holds buffers {there} where this optimizer averages {here}: build it "
                "with the same buffers"
            )

    def load(self, state: dict[str, Tensor]) -> None:
        """Copy the shared values from a state that fits."""
        for name, shared in self.shared.items():
            shared.copy_(state[name])

    def _present(self) -> list[Tensor]:
        """The module's own buffers, which may be other tensors than before, as after moving it."""
        module = self.module or nn.Module()
        return [module.get_buffer(name) for name in self.shared]


def instances(kind: type) -> list:
    """All objects of a class and its subclasses.

    They are searched among what refers to these classes: asking every object for its class takes
    five times as long.
    """
    kinds = [kind]
    for one in kinds:  # which grows
        kinds += one.__subclasses__()
    return [one for one in gc.get_referrers(*kinds) if issubclass(type(one), kind)]


def warn_of_statistics(layers: Sequence[Layer], averaged: nn.Module | None) -> None:
    """Warn, on rank 0, of running statistics that each worker keeps for itself.

    Args:
        layers: the trained layers.
        averaged: the module whose buffers are averaged, if there is one.
    """
    own = own_statistics(layers, averaged)
    if own and dist.get_rank() == 0:
        more = f" (and {len(own) - 1} more)" if len(own) > 1 else ""
        log.warning(
            "the running statistics of %s%s stay each worker's own, and so what the model makes of "
            "a batch in eval(): give buffers=model, which averages them in every round, or convert "
            "to SyncBatchNorm",
            own[0], more,
        )  # fmt: skip


def own_statistics(layers: Sequence[Layer], averaged: nn.Module | None) -> list[str]:
    """The names of modules with running statistics of their own in the models of trained layers.

    Leaves out modules in `averaged`, and SyncBatchNorm, whose statistics are the same on all
    workers.

    Args:
        layers: the trained layers.
        averaged: the module whose buffers are averaged, if there is one.
    """
    known = {id(module) for module in averaged.modules()} if averaged else set()
    own = {
        id(module)
        for module in instances(_NormBase)
        if module.track_running_stats and not isinstance(module, SyncBatchNorm)
        if id(module) not in known
    }
    if not own:
        return []
    trained = {id(layer.parameter) for layer in layers}
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    models = [m for m in modules if any(id(one) in trained for one in m.parameters())]
    named: dict[int, str] = {}  # as the largest model has it, which therefore comes first
    for model in sorted(models, key=lambda model: -len([*model.modules()])):
        for name, module in model.named_modules():
            if id(module) in own:
                named.setdefault(id(module), name or type(module).__name__)
    return sorted(named.values())
