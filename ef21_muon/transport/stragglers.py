"""Warns of the ranks that keep the others waiting in a step."""

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

REPORT_AFTER = 10.0  # seconds of waiting, or three times the longest wait so far if that is more
CHECK_EVERY = 1.0  # seconds

log = logging.getLogger("ef21_muon")
_built: Counter[str] = Counter()  # monitors by group: all ranks build theirs in the same order


class StragglerMonitor:
    """Logs a warning that names the ranks which do not come to a step while this rank waits in it.

    A thread checks every second how long this rank has been in its step. If that is long, the
    thread writes the step to the process group's store and reads there which steps the other ranks
    are in. A step itself costs nothing and sends no message. The thread ends with this object.

    It notices what the process waits for, as with gloo. With NCCL the device waits, not the
    process, and the monitor is silent.

    Args:
        group: the ranks that step together; None stands for the default process group.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        # A client of its own: that of the main thread may be waiting.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.ranks, self.rank = dist.get_process_group_ranks(group), dist.get_rank()
        name = (group or dist.distributed_c10d._get_default_group()).group_name
        self.store = dist.PrefixStore(f"ef21_muon/{name}/{_built[name]}", store)
        _built[name] += 1
        self.current: tuple[int, float] | None = None  # this rank's step, and when it began
        self.reported: int | None = None  # the last step that was reported
        self.longest = 0.0  # the longest wait that has ended, in seconds
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Enter a step, in which this rank waits for others.

        An error in it is written to the store, so that the ranks which wait can report it.

        Args:
            number: of the step, from 0.
        """
        self.current = number, (since := time.monotonic())
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):  # the store has gone with the process group
                self.store.set(f"refused/{self.rank}", f"{number} {error}")
            raise
        finally:
            self.current, self.longest = None, max(self.longest, time.monotonic() - since)

    def check(self) -> None:
        """Log a warning if this rank has waited for too long; one warning per step."""
        current = self.current
        if current is None or current[0] == self.reported:
            return
        step, since = current
        waited = time.monotonic() - since
        if waited < CHECK_EVERY:
            return
        self.store.set(f"in/{self.rank}", str(step))
        refused = self._sent("refused", step)
        if not refused and waited < max(REPORT_AFTER, 3 * self.longest):
            return
        absent = [rank for rank in self.ranks if rank not in self._sent("in", step)]
        if self.current != current or not absent:
            return
        why = "".join(f"; rank {rank} refused it: {reason}" for rank, reason in refused.items())
        log.warning(
            "rank %d has waited for %.0f s in step %d for rank %s%s: give every rank as many steps "
            "(batches), and look there for what it does instead",
            self.rank, waited, step + 1, ", ".join(map(str, absent)), why,
        )  # fmt: skip
        self.reported = step

    def _sent(self, kind: str, step: int) -> dict[int, str]:
        """The texts of one kind, "in" or "refused", that ranks have sent of a step, by rank."""
        found = {}
        for rank in self.ranks:
            key = f"{kind}/{rank}"
            if self.store.check([key]):
                of, _, reason = self.store.get(key).decode().partition(" ")
                if int(of) == step:
                    found[rank] = reason
        return found


def _watch(reference: weakref.ref) -> None:
    while (monitor := reference()) is not None:
        try:
            monitor.check()
        except (RuntimeError, ValueError):  # the store has gone with the process group
            return
        del monitor
        time.sleep(CHECK_EVERY)
