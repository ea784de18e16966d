"""Floating-point buffers of a model, as running statistics are: workers share their mean."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ef21_muon.exchange.collectives import Traffic, all_gather, place_in, wait


class Buffers:
    """The buffers of `module` that its state has; integer ones are left to every worker.

    `shared` is, by name, what all workers of the group share: the mean of the last round, at first
    the buffers as they are. Without a module there are none. Raises ValueError for what is no
    module.
    """

    def __init__(self, module: nn.Module | None, group: dist.ProcessGroup | str | None):
        if not isinstance(module, nn.Module | None):
            raise ValueError(
                f"buffers={type(module).__name__} is not allowed: give the model, or the part of it"
                " whose buffers are to be averaged"
            )
        self.module, self.group = module, group
        kept = module.state_dict().keys() if module else ()
        named = module.named_buffers() if module else ()
        self.shared = {
            name: buffer.clone()
            for name, buffer in named
            if name in kept and buffer.is_floating_point()
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
        mine = torch.cat([buffer.flatten() for buffer in self._present()])
        _, ranks = place_in(self.group)
        of_ranks = mine[None]
        if ranks > 1:
            flat = mine.new_empty(ranks * len(mine))
            wait([all_gather(flat, mine, self.group, async_op=True)])
            of_ranks = flat.view(ranks, len(mine))
        mean = torch.where((of_ranks == of_ranks[0]).all(0), of_ranks[0], of_ranks.mean(0))
        former = torch.cat([shared.flatten() for shared in self.shared.values()])
        mean = torch.where(former.isfinite() & ~mean.isfinite(), former, mean)
        parts = mean.split([one.numel() for one in self.shared.values()])
        for part, shared, own in zip(parts, self.shared.values(), self._present(), strict=True):
            shared.copy_(part.view_as(shared))
            own.copy_(shared)
        size, others = mine.nbytes, ranks - 1
        return Traffic(size, 0, others * size, others * size)

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
        shapes, its_shapes = (
            {name: tuple(one.shape) for name, one in ours.items()} for ours in (self.shared, state)
        )
        if shapes != its_shapes:
            raise ValueError(
                f"the state holds buffers {its_shapes} where this optimizer averages {shapes}: "
                "build it with the same buffers"
            )

    def load(self, state: dict[str, Tensor]) -> None:
        """What workers share, from a state that fits."""
        for name, shared in self.shared.items():
            shared.copy_(state[name])

    def _present(self) -> list[Tensor]:
        """The module's own, which may be others than before, as after moving it."""
        return [self.module.get_buffer(name) for name in self.shared]
