"""What a device has noted, read some steps later, so that no step waits for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Notice:
    """Whether any of some flags is set, as far as copies of them have come to the host."""

    def __init__(self):
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._said = False

    def look(self, flags: Sequence[Tensor]) -> bool:
        """True, once, where a flag was set when an earlier look started a copy; starts the next."""
        if self._said or (self._arrived is not None and not self._arrived.query()):
            return False
        self._said = self._copy is not None and any(self._copy.tolist())
        now = torch.cat(list(flags))
        if now.is_cuda:
            self._copy = torch.empty(now.shape, dtype=now.dtype, pin_memory=True)
            self._copy.copy_(now, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._copy = now
        return self._said
