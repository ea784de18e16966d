"""What happens to workers and their lighthouse, and how long the others may wait then."""

import random
import signal
import time

from scripts.chaos.crew import Crew
from scripts.fleet import HEARTBEAT_SECONDS
from training.fleet import FACTOR, MARGIN

SLACK = 15  # seconds: a message's own patience, a quorum, and a machine that has other work
GONE = HEARTBEAT_SECONDS + SLACK


def draws(count: int, kinds: list[str], workers: int, seed: int) -> list[dict]:
    """What is random about `count` faults, in their order: each kind as often as any other."""
    generator = random.Random(seed)
    order = []
    while len(order) < count:
        order += generator.sample(kinds, len(kinds))
    return [
        {
            "kind": kind,
            "worker": generator.randrange(workers),
            "delay": round(generator.uniform(0, 3), 2),
            "lasts": round(generator.uniform(1, 12), 2),
        }
        for kind in order[:count]
    ]


def kill(crew: Crew, worker: int, lasts: float) -> None:
    """It is started again, within a second."""
    crew.send(worker, signal.SIGKILL)


def lose(crew: Crew, worker: int, lasts: float) -> None:
    """A machine, with all that runs there, that comes back later."""
    crew.end(worker, signal.SIGKILL)
    time.sleep(lasts)
    crew.start(worker)


def preempt(crew: Crew, worker: int, lasts: float) -> None:
    """Asked to stop, and started again later."""
    crew.end(worker, signal.SIGTERM)
    time.sleep(lasts)
    crew.start(worker)


def stop(crew: Crew, worker: int, lasts: float) -> None:
    """The process stands still, and resumes where it was."""
    crew.send(worker, signal.SIGSTOP)
    time.sleep(lasts)
    crew.send(worker, signal.SIGCONT)


def hang(crew: Crew, worker: int, lasts: float) -> None:
    """In Python, for ever, while it says that it lives."""
    crew.send(worker, signal.SIGUSR1)


def part(crew: Crew, worker: int, lasts: float) -> None:
    """Its W becomes another."""
    crew.send(worker, signal.SIGUSR2)


def lighthouse(crew: Crew, worker: int, lasts: float) -> None:
    """It ends, and starts again later."""
    crew.end_lighthouse()
    time.sleep(lasts)
    crew.start_lighthouse()


FAULTS = {one.__name__: one for one in (kill, lose, preempt, stop, hang, part, lighthouse)}


def bound(kind: str, lasts: float, longest_step: float) -> float:
    """Seconds that a worker which nothing happened to waits at most in a round."""
    return {
        "hang": MARGIN + FACTOR * longest_step + GONE,
        "lighthouse": lasts + GONE,
    }.get(kind, GONE)
