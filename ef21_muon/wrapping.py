"""What optimizers around others have in common."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ef21_muon.communicating import CommunicatingOptimizer
from ef21_muon.identity import identity_of
from ef21_muon.inner import guard, require_float_state, require_inner
from ef21_muon.rules import S2W, W2S, rule_of
from ef21_muon.served import ServedOptimizer


class WrappingOptimizer(ServedOptimizer):
    """Sends messages around the steps of `inner`, one or several optimizers that send nothing.

    `param_groups` are theirs, so schedulers act on their lr; `rules` has the compressors of every
    group.
    """

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        w2s: W2S,
        s2w: S2W,
        *,
        seed: int,
        process_group: dist.ProcessGroup | str | None,
        missing: str = "refuse",
        buffers: nn.Module | None = None,
    ):
        self.inner = [inner] if isinstance(inner, Optimizer) else [*inner]
        require_inner(self.inner)
        groups = [group for optimizer in self.inner for group in optimizer.param_groups]
        super().__init__(
            groups,
            {},
            seed=seed,
            purposes=("w2s", "s2w"),
            process_group=process_group,
            missing=missing,
            buffers=buffers,
        )
        self.param_groups = groups
        self.defaults = {**self.inner[0].defaults}  # which schedulers of a momentum look at
        self.RULE = tuple({entry for one in self.inner for entry in getattr(one, "RULE", ())})
        self.rules = [rule_of(group, w2s, s2w) for group in groups]
        for optimizer in self.inner:
            own = getattr(optimizer, "generators", {})
            self.generators |= {f"inner_{purpose}": one for purpose, one in own.items()}
        self._inner_checked = False
        guard(self)

    def _step_inner(self) -> None:
        with self.timer("server"):
            for optimizer in self.inner:
                optimizer.step()
        if not self._inner_checked:
            require_float_state(self.inner)
            self._inner_checked = True

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        guard(self)

    def _settings(self) -> dict:
        settings = super()._settings() | {"number of inner optimizers": len(self.inner)}
        for place, inner in enumerate(self.inner):
            ours = isinstance(inner, CommunicatingOptimizer)
            its = inner._settings() if ours else identity_of(inner)
            settings |= {f"{key} of inner {place}": value for key, value in its.items()}
        return settings

    def go_on_after(self, steps: int) -> None:
        super().go_on_after(steps)
        for optimizer in self.inner:
            if isinstance(optimizer, CommunicatingOptimizer):
                optimizer.go_on_after(steps)
