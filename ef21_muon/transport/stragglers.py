"""Who waits in a step for whom, told while it waits."""

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

NOTICE = 10.0  # seconds of waiting before it is told, or three times the longest wait so far
LOOK = 1.0  # seconds between looks at the others

log = logging.getLogger("ef21_muon")
_built = Counter()  # roll calls by group: ranks build theirs in the same order


class StragglerMonitor:
    """Tells in the log, with a warning, which ranks do not come to the step that this one waits in.

    A thread looks at a rank's own step every second; where that takes longer, it leaves a word in
    the process group's store and looks for those of the others. So a step costs nothing, and takes
    no message. It ends with the object. It sees what the process waits for, as with gloo; with NCCL
    it is the device that waits.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        group = group or dist.group.WORLD
        self.ranks, self.rank = dist.get_process_group_ranks(group), dist.get_rank()
        name = f"{group.group_name}/{_built[group.group_name]}"
        _built[group.group_name] += 1
        # A client of its own: that of the main thread may be waiting.
        store = dist.distributed_c10d._get_default_store().clone()
        self.words = dist.PrefixStore(f"ef21_muon/{name}", store)
        self.here: tuple[int, float] | None = None  # the step that this rank is in, since when
        self.told: int | None = None  # the last step that was told of
        self.longest = 0.0  # wait that came to an end
        threading.Thread(target=_look, args=(weakref.ref(self),), daemon=True).start()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Within it this rank takes a step, in which it waits for others; an error refuses it."""
        self.here = number, time.monotonic()
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):  # the store has gone with the process group
                self.words.set(f"refused/{self.rank}", f"{number} {error}")
            raise
        finally:
            _, since = self.here
            self.here, self.longest = None, max(self.longest, time.monotonic() - since)

    def look(self) -> None:
        """Say what there is to say of this rank's step, once."""
        here = self.here
        if here is None or here[0] == self.told:
            return
        step, since = here
        waited = time.monotonic() - since
        if waited < LOOK:
            return
        self.words.set(f"in/{self.rank}", str(step))
        refused = self._said("refused", step)
        if not refused and waited < max(NOTICE, 3 * self.longest):
            return
        absent = [rank for rank in self.ranks if rank not in self._said("in", step)]
        if self.here != here or not absent:
            return
        why = "".join(f"; rank {rank} refused it: {reason}" for rank, reason in refused.items())
        log.warning(
            "rank %d has waited for %.0f s in step %d for rank %s%s: give every rank as many steps "
            "(batches), and look there for what it does instead",
            self.rank, waited, step + 1, ", ".join(map(str, absent)), why,
        )  # fmt: skip
        self.told = step

    def _said(self, kind: str, step: int) -> dict[int, str]:
        """The words of this kind about a step, by rank."""
        said = {}
        for rank in self.ranks:
            key = f"{kind}/{rank}"
            if self.words.check([key]):
                of, _, reason = self.words.get(key).decode().partition(" ")
                if int(of) == step:
                    said[rank] = reason
        return said


def _look(reference: weakref.ref) -> None:
    while (stragglers := reference()) is not None:
        try:
            stragglers.look()
        except (RuntimeError, ValueError):  # the store has gone with the process group
            return
        del stragglers
        time.sleep(LOOK)
