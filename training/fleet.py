"""Workers that come and go, in a run: membership=torchft."""

import faulthandler
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from omegaconf import DictConfig, OmegaConf

from ef21_muon import LocalSteps
from ef21_muon.transport.fixed import Transport
from training.config import what_matters
from training.log import NoLog, RunLog
from training.membership import require_addresses, require_way_here
from training.schedule import new_scheduler
from training.workers import FinalError, RunError, Workers, one_line

# What torchft fetches is read, and not written.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
MARGIN, FACTOR = 30.0, 5  # seconds, and times the longest so far, after which something hangs
LAST_WAIT = 10.0  # seconds for others, of a worker that was asked to stop
SELDOM = 10  # steps, at most, between questions of fixed workers whether to stop
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


def members_of(config: DictConfig, workers: Workers) -> "FixedMembers | FleetMembers":
    """What a run does because of who its workers are."""
    return FleetMembers(config, workers) if comes_and_goes(config) else FixedMembers()


class FixedMembers:
    """Workers that are there from the first step of a run to its last: little is done for that.

    FleetMembers has the same calls, and says what they are for. `run` is a train.Run.
    """

    def transport(self, method: type) -> Transport | None:
        return None

    def ask_every(self, optimizer: torch.optim.Optimizer) -> int:
        """Steps, at most, between questions whether to stop: who seldom sends seldom asks."""
        return min(*optimizer.rounds.lengths, SELDOM)

    def at_work(self, what: str) -> AbstractContextManager:
        return nullcontext()

    def refusals(self, log: RunLog | NoLog) -> AbstractContextManager:
        return nullcontext()

    def join(self, run) -> None: ...

    def synced_steps(self, step: int) -> int:
        return step

    def follow(self, run) -> None: ...

    def tell(self, log: RunLog | NoLog) -> None: ...

    def wait_for_peers(self, run, log: RunLog | NoLog, late: float | None) -> None: ...

    def facts(self) -> dict:
        return {}

    def leave(self) -> None: ...


class FleetMembers:
    """A worker among others that come and go. RunError where it has other ranks than configured."""

    def __init__(self, config: DictConfig, workers: Workers):
        if workers.count != config.ranks_per_worker:
            raise RunError(
                f"membership={config.membership.name} has a torchrun for each worker, of "
                f"ranks_per_worker={config.ranks_per_worker} ranks, this one has {workers.count}: see "
                "scripts/fleet.py"
            )
        self.config, self.workers = config, workers
        # One that hangs ends itself, since the others can go on without it.
        self.watchdog = Watchdog(workers.timeout.total_seconds())
        self.quorums = QuorumRecords()
        self._asked: float | None = None  # when it was first seen that this worker shall stop

    def transport(self, method: type) -> Transport | None:
        """Of messages among the workers of the moment, for local steps.

        Raises RunError where there is no torchft, and for another method.
        """
        own, workers = self.config.membership, self.workers
        if not issubclass(method, LocalSteps):
            raise RunError(
                f"membership={own.name} needs local steps, {method.__name__} cannot go on "
                "without a worker: give optimizer=local, diloco, muloco or sparseloco"
            )
        try:
            from ef21_muon.fleet import Fleet
        except ImportError as error:
            raise RunError(f"membership={own.name}: {one_line(error)}") from error

        patience = workers.timeout.total_seconds()
        require_addresses(own, patience)
        self.fleet = Fleet(
            own.worker,
            own.lighthouse,
            host=own.host,
            group=workers.control if workers.count > 1 else None,
            patience=patience,
            while_waiting=self._wait,
            run=what_matters(OmegaConf.to_container(self.config, resolve=True)),
        )
        members = self.fleet.members
        if own.host is None:
            require_way_here(members.host, f"this machine's name {members.host}", patience)
        self.watchdog.waited = lambda: members.waited
        return self.fleet

    def _wait(self, seconds: float) -> None:
        if self.workers.asked_to_stop:  # the round may be about to come
            now = time.monotonic()
            self._asked = self._asked or now
            if now - self._asked > LAST_WAIT:
                raise Stopped
        self.watchdog.extend(seconds)

    def ask_every(self, optimizer: torch.optim.Optimizer) -> int:
        """Steps between questions whether to stop, which are of this worker's ranks alone."""
        return 1

    def at_work(self, what: str) -> AbstractContextManager:
        """Within it this worker is at work on `what`, and ends itself if it hangs."""
        return self.watchdog(what)

    @contextmanager
    def refusals(self, log: RunLog | NoLog) -> Iterator[None]:
        """Within it this worker ends for good where it cannot be among the others."""
        from ef21_muon.fleet import FleetRefused  # needs torchft, as transport does

        try:
            yield
        except FleetRefused as error:
            self.tell(log)
            worker = self.config.membership.worker
            raise FinalError(f"worker {worker} cannot go on: {one_line(error)}") from error

    def join(self, run) -> None:
        """Meet the others, before the first step, and go on from where they are."""
        self.fleet.join()
        self.follow(run)

    def synced_steps(self, step: int) -> int:
        """Local steps in W of all workers, where this one has taken so many."""
        return self.fleet.synced_steps

    def follow(self, run) -> None:
        """Go on from the step that the others are at, where that is another."""
        steps = run.optimizer.steps
        if steps != run.scheduler.last_epoch:
            run.scheduler = new_scheduler(run.optimizer, run.config, steps)
            run.feed.batches.restart(steps)

    def tell(self, log: RunLog | NoLog) -> None:
        """Records of the rounds since the last call."""
        for record in self.quorums.records(self.fleet):
            log.membership(record)

    def wait_for_peers(self, run, log: RunLog | NoLog, late: float | None) -> None:
        """After the last step: wait for others that are late.

        late: the test loss of this worker if it was late itself, which the log has not yet.
        """
        self.fleet.wait_for_peers(self.config.membership.workers, LATE)
        self.tell(log)
        if late is not None:
            log.eval(run.position() | {"test_loss": late})

    def facts(self) -> dict:
        """What the end record has beside the usual: a hash of the state, equal on all workers."""
        return {"state": f"{self.fleet.digest():016x}"}

    def leave(self) -> None:
        """Let the others go on without this worker, which has nothing more to do."""
        self.watchdog.stop()
        self.fleet.leave()


class Watchdog:
    """Ends this process where it hangs, and tells where; then the others go on without it.

    What hangs is what takes far longer than ever before; `patience` seconds at first.
    scripts/supervise.py starts the worker again.
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


class QuorumRecords:
    """The records of rounds: who met, why others than before, and how long it took."""

    def __init__(self):
        self.workers: tuple[int, ...] | None = None

    def records(self, fleet) -> Iterator[dict]:
        """Of the rounds of a Fleet since the last call."""
        while fleet.quorums:
            quorum = fleet.quorums.popleft()
            before, self.workers = self.workers, quorum.workers
            why = []
            if before is not None:
                why += [f"worker {one} came" for one in sorted({*self.workers} - {*before})]
                why += [f"worker {one} is gone" for one in sorted({*before} - {*self.workers})]
            if quorum.diverged:
                why.append("had another history")
            if quorum.healed:
                why.append("took over the others' state")
            why += quorum.notes
            yield {
                "step": quorum.step,
                "workers": list(quorum.workers),
                "messages": quorum.messages,
                "why": why,
                "tries": quorum.tries,
                "seconds": round(quorum.seconds, 3),
                "state": quorum.history,
            }
