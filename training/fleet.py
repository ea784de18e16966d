"""Workers that come and go, in a run: membership=torchft."""

import faulthandler
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from omegaconf import DictConfig, OmegaConf

from ef21_muon import LocalSteps
from training.config import what_matters
from training.schedule import new_scheduler
from training.workers import RunError, Workers, one_line

# What torchft fetches is read, and not written.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
MARGIN, FACTOR = 30.0, 5  # seconds, and times the longest so far, after which something hangs
LAST_WAIT = 10.0  # seconds for others, of a worker that was asked to stop
LATE = 60.0  # seconds that one waits at the end for those that are late


class Stopped(Exception):
    """This worker was asked to stop while it waited for others."""


def comes_and_goes(config: DictConfig) -> bool:
    """Whether the workers of a run do."""
    return config.membership.name != "fixed"


def place_among_all(config: DictConfig, workers: Workers) -> tuple[int, int]:
    """This rank among those of all workers that there may be, and how many those are."""
    if not comes_and_goes(config):
        return workers.rank, workers.count
    own = config.membership
    return own.worker * workers.count + workers.rank, own.workers * workers.count


def with_fleet(config: DictConfig, make: partial, workers: Workers, watch: "Watch") -> partial:
    """A maker of the same local steps, whose rounds are of the workers of the moment.

    Raises RunError where there is no torchft, and for what is not LocalSteps.
    """
    own = config.membership
    if not issubclass(make.func, LocalSteps):
        raise RunError(
            f"membership={own.name} needs local steps, {make.func.__name__} cannot go on without a "
            "worker: give optimizer=local, diloco, muloco or sparseloco"
        )
    if workers.count != config.worker_size:
        raise RunError(
            f"membership={own.name} has a torchrun for each worker, of worker_size="
            f"{config.worker_size} ranks, this one has {workers.count}: see scripts/fleet.py"
        )
    try:
        from ef21_muon.exchange.fleet import Fleet
        from ef21_muon.fleet import FleetSteps
    except ImportError as error:
        raise RunError(f"membership={own.name}: {one_line(error)}") from error

    asked: list[float] = []

    def wait(seconds: float) -> None:
        if workers.asked_to_stop:  # the round may be about to come
            asked.append(time.monotonic())
            if asked[-1] - asked[0] > LAST_WAIT:
                raise Stopped
        watch.extend(seconds)

    fleet = Fleet(
        own.worker,
        own.lighthouse,
        host=own.host,
        group=workers.control if workers.count > 1 else None,
        patience=workers.timeout.total_seconds(),
        while_waiting=wait,
    )
    watch.waited = lambda: fleet.waited
    run = json.dumps(what_matters(OmegaConf.to_container(config, resolve=True)), sort_keys=True)
    digest = hashlib.sha256(run.encode()).hexdigest()[:16]
    return partial(FleetSteps, fleet=fleet, run=digest, **make.keywords)


def follow(run) -> None:
    """Go on from the step that the other workers are at, where that is another."""
    steps = run.optimizer.steps
    if steps != run.scheduler.last_epoch:
        run.scheduler = new_scheduler(run.optimizer, run.config, steps)
        run.feed.batches.restart(steps)


class Watch:
    """Ends this process where it hangs, and tells where; then the others go on without it.

    What hangs is what takes far longer than ever before; `patience` seconds at first. torchrun
    starts the worker again.
    """

    def __init__(self, patience: float):
        self.patience = patience
        self.longest: dict[str, float] = {}
        self.waited: Callable[[], float] = lambda: 0.0  # seconds for others, so far

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        longest, start = self.longest.get(what), time.monotonic() - self.waited()
        self._end_in(self.patience if longest is None else MARGIN + FACTOR * longest)
        yield
        took = time.monotonic() - self.waited() - start
        self.longest[what] = max(longest or 0.0, took)
        self.extend(0)

    def extend(self, seconds: float) -> None:
        """It waits for so long at most, and for good reason."""
        self._end_in(seconds + MARGIN)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _end_in(seconds: float) -> None:
        # By a thread that needs nothing of Python's.
        faulthandler.dump_traceback_later(seconds, exit=True)


class Meetings:
    """The records of rounds: who met, why others than before, and how long it took."""

    def __init__(self):
        self.workers: tuple[int, ...] | None = None

    def records(self, optimizer) -> Iterator[dict]:
        """Of the rounds since the last call; there are none where workers are fixed."""
        meetings = getattr(optimizer, "meetings", None)
        while meetings:
            meeting = meetings.popleft()
            before, self.workers = self.workers, meeting.workers
            why = []
            if before is not None:
                why += [f"worker {one} came" for one in sorted({*self.workers} - {*before})]
                why += [f"worker {one} is gone" for one in sorted({*before} - {*self.workers})]
            if meeting.parted:
                why.append("had another history")
            if meeting.healed:
                why.append("took over the others' state")
            yield {
                "step": meeting.step,
                "workers": list(meeting.workers),
                "messages": meeting.messages,
                "why": why,
                "tries": meeting.tries,
                "seconds": round(meeting.seconds, 3),
                "state": meeting.history,
            }
