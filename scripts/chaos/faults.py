"""What happens to workers and their lighthouse, and how long the others may wait then."""

import signal
import time
from collections.abc import Callable

from scripts.chaos.crew import Crew
from scripts.faults import stopped
from scripts.fleet import HEARTBEAT_SECONDS
from training.fleet import FACTOR, MARGIN

SLACK = 15  # seconds: a message's own patience, a quorum, and a machine that has other work
GONE = HEARTBEAT_SECONDS + SLACK


def sent(number: signal.Signals) -> Callable:
    def fault(crew: Crew, worker: int, lasts: float) -> None:
        crew.send(worker, number)

    return fault


def away(number: signal.Signals) -> Callable:
    """A machine, with all that runs there, ends by a signal, and comes back later."""

    def fault(crew: Crew, worker: int, lasts: float) -> None:
        crew.end(worker, number)
        time.sleep(lasts)
        crew.start(worker)

    return fault


def stop(crew: Crew, worker: int, lasts: float) -> None:
    with stopped(crew, worker):
        time.sleep(lasts)


def lighthouse(crew: Crew, worker: int, lasts: float) -> None:
    crew.end_lighthouse()
    time.sleep(lasts)
    crew.start_lighthouse()


FAULTS = {
    "kill": sent(signal.SIGKILL),  # it is started again, within a second
    "lose": away(signal.SIGKILL),
    "preempt": away(signal.SIGTERM),
    "stop": stop,
    "hang": sent(signal.SIGUSR1),  # in Python, for ever, while it says that it lives
    "part": sent(signal.SIGUSR2),  # its W becomes another
    "lighthouse": lighthouse,
}


def bound(kind: str, lasts: float, longest_step: float) -> float:
    """Seconds that a worker which nothing happened to waits at most in a round."""
    longer = {"hang": MARGIN + FACTOR * longest_step, "lighthouse": lasts}
    return longer.get(kind, 0) + GONE


def longest_wait(crew: Crew, fault: dict) -> dict:
    """In the rounds of a fault: of workers to which nothing happened, and what is promised."""
    spared = [one for one in crew.jobs if fault["kind"] == "lighthouse" or one != fault["worker"]]
    rounds = (one for worker in spared for one in crew.rounds(worker))
    steps = range(fault["step"] + 1, fault["until_step"] + 1)
    waits = [one["seconds"] for one in rounds if one["step"] in steps]
    promised = bound(fault["kind"], fault["lasts"], crew.pace)
    return {"longest_wait": max(waits, default=0.0), "promised": round(promised, 1)}
