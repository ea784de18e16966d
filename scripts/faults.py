"""What chaos and soak share: faults, their order, and what runs have come to."""

import hashlib
import random
import signal
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.netns import MTU, Network
from scripts.studies import OVERRIDES, read_records, select
from training.checkpoint import read_facts
from training.records import LOG_NAME
from training.workers import RunError

TINY = ["model.layers=1", "model.width=32", "model.heads=2", "model.context=32"]
VARYING = ("seconds", "phases", "started", "optimizer_share", "config", "overrides", "commit")


def options(kinds: Iterable[str], faults: int, minutes: float) -> dict[str, dict]:
    """Of the command line."""
    return {
        **OVERRIDES,
        "--faults": {"type": int, "default": faults, "help": "how many"},
        "--minutes": {"type": float, "default": minutes, "help": "at most, for faults to begin"},
        "--seed": {"type": int, "default": 0, "help": "of the faults"},
        "--kinds": {"default": ",".join(kinds), "help": "of faults"},
    }


def draws(given: Namespace, details: Callable[[random.Random], dict]) -> list[dict]:
    """What is random about all faults, in their order: each kind comes as often as any other."""
    generator, kinds, order = random.Random(given.seed), given.kinds.split(","), []
    while len(order) < given.faults:
        order += generator.sample(kinds, len(kinds))
    return [{"kind": kind} | details(generator) for kind in order[: given.faults]]


@contextmanager
def stopped(workers, number: int) -> Iterator[bool]:
    """A worker's process stands still, and then resumes where it was; whether it was there."""
    yield workers.send(number, signal.SIGSTOP)
    workers.send(number, signal.SIGCONT)


@contextmanager
def cut(network: Network, node: int) -> Iterator[None]:
    """A node's link is down."""
    network.run(node, "ip", "link", "set", "eth0", "down")
    yield
    network.run(node, "ip", "link", "set", "eth0", "up")


@contextmanager
def slow(network: Network, node: int) -> Iterator[None]:
    """What a node sends goes at 1 Mbit/s."""
    discipline = f"tbf rate 1mbit burst {4 * MTU} latency 1s".split()
    network.run(node, "tc", "qdisc", "add", "dev", "eth0", "root", *discipline)
    yield
    network.run(node, "tc", "qdisc", "del", "dev", "eth0", "root")


def outcome(directory: Path) -> tuple[list[dict], dict[str, str]]:
    """What equal runs have in common: the log without times, the last checkpoint's SHA-256s."""
    log = [
        {key: value for key, value in record.items() if key not in VARYING}
        for record in read_records(directory / LOG_NAME)
    ]
    last = max((directory / "checkpoints").glob("step-????????"))
    return log, {file.name: sha256(file) for file in last.glob("*.distcp")}


def rounds_of(log: list[dict]) -> list[dict]:
    """Of a worker that comes and goes, the records of its rounds."""
    return [one for one in select(log, record="membership") if one["step"] is not None]


def agreement(logs: list[list[dict]]) -> dict:
    """What workers that come and go have agreed on: in every round, and at the end."""
    rounds = [one for log in logs for one in rounds_of(log)]
    histories: dict[int, set] = {}
    for one in rounds:
        histories.setdefault(one["step"], set()).add(one["state"])
    completed = [log[-1] for log in logs if log[-1].get("status") == "completed"]
    ends = {(one["state"], one["test_loss"]) for one in completed}
    return {
        "rounds_seen": len(histories),
        "rounds_with_two_histories": sum(len(states) > 1 for states in histories.values()),
        "had_another_history": sum("had another history" in one["why"] for one in rounds),
        "workers_completed": len(completed),
        "equal_at_the_end": len(completed) == len(logs) and len(ends) == 1,
        "tokens": completed[0]["tokens"],
        "test_loss": completed[0]["test_loss"],
    }


def is_whole(checkpoint: Path) -> bool:
    """Whether all its files are as they were written."""
    with suppress(OSError, RunError):
        files = read_facts(checkpoint)["files"]
        return all(sha256(checkpoint / name) == digest for name, digest in files.items())
    return False


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def answer(holds: bool) -> str:
    return f"**{'yes' if holds else 'NO'}**"


def hand_in(text: str, holds: bool, folder: Path) -> str:
    """Write README.md. Raises RunError if something does not hold that is asked for."""
    (folder / "README.md").write_text(text)
    if not holds:
        raise RunError(f"not all holds that is asked for: see {folder}/README.md")
    return text
