"""Who the workers of a run are: fixed, or workers that come and go (membership=torchft)."""

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

# torchft only reads the buffers that it fetches.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
# A worker hangs if something takes longer than MARGIN seconds + FACTOR times the longest so far.
MARGIN, FACTOR = 30.0, 5
LAST_WAIT = 10.0  # seconds that a worker still waits for others after it was asked to stop
MOST_STEPS = 10  # between two questions of fixed workers whether to stop
LATE = 60.0  # seconds that a worker waits at the end for those that are late


class StoppedWhileWaiting(Exception):
    """This worker was asked to stop while it waited for others."""


def comes_and_goes(config: DictConfig) -> bool:
    """Whether the workers of a run come and go."""
    return config.membership.name != "fixed"


def place_among_all(config: DictConfig, workers: Workers) -> tuple[int, int]:
    """This rank's place among the ranks of all possible workers, and the number of those ranks."""
    if not comes_and_goes(config):
        return workers.rank, workers.count
    own = config.membership
    return own.worker * workers.count + workers.rank, own.workers * workers.count


def new_membership(config: DictConfig, workers: Workers) -> "FixedMembership | FleetMembership":
    """The membership of a run's workers."""
    return FleetMembership(config, workers) if comes_and_goes(config) else FixedMembership()


class FixedMembership:
    """Workers that stay from the first step of a run to the last. Most methods do nothing.

    FleetMembership has the same methods, and describes them. `run` is a train.Run.
    """

    def transport(self, method: type) -> Transport | None:
        return None

    def stop_check_interval(self, optimizer: torch.optim.Optimizer) -> int:
        """The most steps between questions whether to stop: no more questions than rounds."""
        return min(*optimizer.rounds.lengths, MOST_STEPS)

    def watchdog(self, what: str) -> AbstractContextManager:
        return nullcontext()

    def end_if_refused(self, log: RunLog | NoLog) -> AbstractContextManager:
        return nullcontext()

    def join(self, run) -> None: ...

    def synced_steps(self, step: int) -> int:
        return step

    def catch_up(self, run) -> None: ...

    def report(self, log: RunLog | NoLog) -> None: ...

    def wait_for_peers(self, run, log: RunLog | NoLog, late: float | None) -> None: ...

    def end_facts(self) -> dict:
        return {}

    def leave(self) -> None: ...


class FleetMembership:
    """A worker among others that come and go.

    Raises RunError if the number of its ranks is not ranks_per_worker.
    """

    def __init__(self, config: DictConfig, workers: Workers):
        if workers.count != config.ranks_per_worker:
            raise RunError(
                f"membership={config.membership.name} has a torchrun for each worker, of "
                f"ranks_per_worker={config.ranks_per_worker} ranks, this one has "
                f"{workers.count}: see scripts/fleet.py"
            )
        self.config, self.workers = config, workers
        self._watchdog = Watchdog(workers.timeout.total_seconds())
        self.quorums = QuorumRecords()
        self._asked: float | None = None  # when this worker first saw that it has to stop

    def transport(self, method: type) -> Transport | None:
        """The transport of messages among the workers that are present, for local steps.

        Raises RunError if torchft is not installed, and for any other method.
        """
        own, workers = self.config.membership, self.workers
        if not issubclass(method, LocalSteps):
            raise RunError(
                f"membership={own.name} needs local steps, {method.__name__} cannot continue "
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
        self._watchdog.waited = lambda: members.waited
        return self.fleet

    def _wait(self, seconds: float) -> None:
        if self.workers.asked_to_stop:  # but the round may be about to begin
            now = time.monotonic()
            self._asked = self._asked or now
            if now - self._asked > LAST_WAIT:
                raise StoppedWhileWaiting
        self._watchdog.extend(seconds)

    def stop_check_interval(self, optimizer: torch.optim.Optimizer) -> int:
        """The most steps between questions whether to stop.

        Only the ranks of this worker ask each other, so that a question costs little.
        """
        return 1

    def watchdog(self, what: str) -> AbstractContextManager:
        """Inside it, this process ends if it hangs in `what`. The others continue without it."""
        return self._watchdog(what)

    @contextmanager
    def end_if_refused(self, log: RunLog | NoLog) -> Iterator[None]:
        """Inside it, the others' refusal of this worker is a FinalError: no restart can help."""
        from ef21_muon.fleet import FleetRefused  # needs torchft, as transport does

        try:
            yield
        except FleetRefused as error:
            self.report(log)
            worker = self.config.membership.worker
            raise FinalError(f"worker {worker} cannot continue: {one_line(error)}") from error

    def join(self, run) -> None:
        """Join the other workers before the first step, and continue from where they are."""
        self.fleet.join()
        self.catch_up(run)

    def synced_steps(self, step: int) -> int:
        """The number of all workers' local steps that W has, after `step` steps of this worker."""
        return self.fleet.synced_steps

    def catch_up(self, run) -> None:
        """Continue from the step that the others are at, if it is not this worker's."""
        steps = run.optimizer.steps
        if steps != run.scheduler.last_epoch:
            run.scheduler = new_scheduler(run.optimizer, run.config, steps)
            run.batch_source.batches.restart(steps)

    def report(self, log: RunLog | NoLog) -> None:
        """Write the records of the rounds since the last call."""
        for record in self.quorums.records(self.fleet):
            log.membership(record)

    def wait_for_peers(self, run, log: RunLog | NoLog, late: float | None) -> None:
        """Wait, after the last step, for others that are late.

        late: the test loss of this worker if it was late itself. It is then written to the log.
        """
        self.fleet.wait_for_peers(self.config.membership.workers, LATE)
        self.report(log)
        if late is not None:
            log.eval(run.position() | {"test_loss": late})

    def end_facts(self) -> dict:
        """The hash of the state, which is equal on all workers, for the end record."""
        return {"state": f"{self.fleet.digest():016x}"}

    def leave(self) -> None:
        """Leave the other workers, which continue without this one."""
        self._watchdog.stop()
        self.fleet.leave()


class Watchdog:
    """Ends this process if it hangs, and prints where. The others then continue without it.

    Something hangs if it takes far longer than ever before; the first time, if it takes longer than
    `patience` seconds. scripts/supervise.py starts the worker again.
    """

    def __init__(self, patience: float):
        self.patience = patience
        self.longest: dict[str, float] = {}
        self.waited: Callable[[], float] = lambda: 0.0  # seconds spent waiting for others

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        longest, start = self.longest.get(what), time.monotonic() - self.waited()
        self._end_in(self.patience if longest is None else MARGIN + FACTOR * longest)
        yield
        took = time.monotonic() - self.waited() - start
        self.longest[what] = max(longest or 0.0, took)
        self.extend(0)

    def extend(self, seconds: float) -> None:
        """Allow for a wait of so many seconds at most."""
        self._end_in(seconds + MARGIN)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _end_in(seconds: float) -> None:
        # The thread that watches does not need the interpreter.
        faulthandler.dump_traceback_later(seconds, exit=True)


class QuorumRecords:
    """Makes the records of rounds: which workers took part, what changed, how long it took."""

    def __init__(self):
        self.workers: tuple[int, ...] | None = None

    def records(self, fleet) -> Iterator[dict]:
        """The records of a Fleet's rounds since the last call."""
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
