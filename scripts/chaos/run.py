"""Chaos: workers die, hang, stop, part and come back at random times, and the run continues.

    python scripts/chaos/run.py [--faults 60] [--workers 4] [--seed 0] [KEY=VALUE ...]

Rounds of a run of local steps by workers that come and go (scripts/fleet.py), each with a seed of
its own, until so many faults have happened; a fault comes when all workers have met again after the
last. Then every round's W has to be the same on all workers, bit for bit, no worker to which
nothing happened may have waited longer than promised (`bound`), and the test loss has to lie
among those of runs without faults: as many, of the same seeds, of as many steps as have the same
tokens. Four machines on one: a step takes at least --pace seconds. Exits with 1 if one of that does
not hold.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts import faults
from scripts.chaos.crew import Crew
from scripts.faults import TINY, agreement, answer, draws, hand_in, stopped
from scripts.fleet import HEARTBEAT_SECONDS
from scripts.studies import command, markdown, select
from training.config import ROOT, compose
from training.fleet import FACTOR, MARGIN

LOG = ROOT / "results" / "chaos" / "chaos.jsonl"
EVERY = 20  # steps
SLACK = 15  # seconds: a message's own patience, a quorum, and a machine that has other work
GONE = HEARTBEAT_SECONDS + SLACK


def sent(crew: Crew, worker: int, lasts: float, number: signal.Signals) -> None:
    crew.send(worker, number)


def away(crew: Crew, worker: int, lasts: float, number: signal.Signals) -> None:
    """A machine, with all that runs there, ends by a signal, and comes back later."""
    crew.end(worker, number)
    time.sleep(lasts)
    crew.start(worker)


def stop(crew: Crew, worker: int, lasts: float) -> None:
    with stopped(crew, worker):
        time.sleep(lasts)


def lighthouse(crew: Crew, worker: int, lasts: float) -> None:
    crew.end_lighthouse()
    time.sleep(lasts)
    crew.start_lighthouse()


FAULTS = {
    "kill": partial(sent, number=signal.SIGKILL),  # it is started again, within a second
    "lose": partial(away, number=signal.SIGKILL),
    "preempt": partial(away, number=signal.SIGTERM),
    "stop": stop,
    "hang": partial(
        sent, number=signal.SIGUSR1
    ),  # in Python, for ever, while it says that it lives
    "part": partial(sent, number=signal.SIGUSR2),  # its W becomes another
    "lighthouse": lighthouse,
}
OPTIONS = {
    **faults.options(FAULTS, faults=60, minutes=40),
    "--workers": {"type": int, "default": 4, "help": "that come and go"},
    "--steps": {"type": int, "default": 4200, "help": "of a round"},
    "--pace": {"type": float, "default": 0.1, "help": "seconds of a step, at least"},
    "--calm": {"type": float, "default": 40, "help": "seconds at the end of a round"},
}
RUN = [
    *(*TINY, "batch.global_size=12", "batch.micro_size=2", "eval.tokens=32768"),
    *("optimizer=local", f"optimizer.sync_every={EVERY}"),
    *("eval.every=1000", "log_every=100", "checkpoint.every=500", "check_every=0"),
]


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


def details(generator: Random, workers: int) -> dict:
    return {
        "worker": generator.randrange(workers),
        "delay": round(generator.uniform(0, 3), 2),
        "lasts": round(generator.uniform(1, 12), 2),
    }


def disturb(crew: Crew, fault: dict) -> dict:
    """Let a fault happen, and wait until all are back; what came of it."""
    before, start, kind = crew.last_step(), time.monotonic(), fault["kind"]
    print(f"step {before}: {fault}", flush=True)
    FAULTS[kind](crew, fault["worker"], fault["lasts"])
    after = before if kind in ("kill", "hang", "part") else crew.last_step()
    back = crew.wait_until_all_meet(after + 2 * EVERY)
    seconds = round(time.monotonic() - start, 1) if back else None
    came = {"step": before, "back_after_seconds": seconds, "until_step": crew.last_step()}
    return {"record": "fault", **fault, **came, **longest_wait(crew, fault | came)}


def chaos(options: argparse.Namespace) -> Iterator[dict]:
    """The records of all rounds with faults, then of those without."""
    start = time.monotonic()
    last_start = start + 60 * options.minutes
    last_step = options.steps - options.calm / options.pace
    left = draws(options, lambda generator: details(generator, options.workers))
    rounds: list[dict] = []
    config = compose((*RUN, *options.overrides)).config
    tokens_per_step = config.batch.global_size * config.model.context
    settings = {"workers": options.workers, "pace": options.pace, "steps": options.steps}
    yield {"record": "start", "seed": options.seed, **settings}
    with tempfile.TemporaryDirectory(prefix="ef21-chaos-") as folder:

        def train(name: str, steps: int, seed: int, pace: float) -> Crew:
            overrides = [*RUN, *options.overrides, f"steps={steps}", f"seed={seed}"]
            return Crew(options.workers, Path(folder, name), overrides, pace)

        def due() -> bool:
            return bool(left) and time.monotonic() < last_start

        while due():
            seed, since = len(rounds), time.monotonic()
            with train(f"faults{seed}", options.steps, seed, options.pace) as crew:
                while due() and crew.wait_until_all_meet(crew.last_step() + 2 * EVERY):
                    time.sleep(left[0]["delay"])
                    if crew.last_step() > last_step:
                        break
                    yield disturb(crew, left.pop(0)) | {"round": seed}
                crew.wait_until_all_end()
                came = agreement([*map(crew.records, crew.jobs)])
            seconds = round(time.monotonic() - since, 1)
            rounds.append({"record": "round", "seed": seed, "seconds": seconds, **came})
            yield rounds[-1]
        for seed, one in enumerate(rounds):
            steps = EVERY * round(one["tokens"] / (EVERY * tokens_per_step))
            with train(f"calm{seed}", steps, seed, 0.0) as crew:
                crew.wait_until_all_end()
                came = agreement([*map(crew.records, crew.jobs)])
            calm = {key: came[key] for key in ("tokens", "test_loss")}
            yield {"record": "calm", "seed": seed, "steps": steps, **calm}
    yield {"record": "end", "seconds": round(time.monotonic() - start, 1)}


def draw(records: list[dict], folder: Path) -> str:
    return hand_in(*report(records), folder)


def report(records: list[dict]) -> tuple[str, bool]:
    """What happened in sentences, and tables; and whether all held that is asked for."""
    first = records[0]
    faults, rounds, calm = (select(records, record=kind) for kind in ("fault", "round", "calm"))
    for place, fault in enumerate(faults):
        fault["promised"] = promised(fault, faults[:place], first["pace"])
    kinds = sorted({one["kind"] for one in faults})
    equal = all(one["equal_at_the_end"] and not one["rounds_with_two_histories"] for one in rounds)
    in_time = all(one["longest_wait"] <= one["promised"] for one in faults)
    losses, without = ([one["test_loss"] for one in some] for some in (rounds, calm))
    among = bool(losses) and min(without) <= mean(losses) <= max(without)
    text = f"""# Chaos

`python scripts/chaos/run.py --seed {first["seed"]}`: {len(faults)} faults of \
{len(kinds)} kinds in {len(rounds)} runs of {first["workers"]} workers that come and go, \
{sum(one["seconds"] for one in rounds) / 60:.0f} minutes.

- W is the same on all workers, bit for bit, before every one of \
{sum(one["rounds_seen"] for one in rounds):,} rounds and at the end: {answer(equal)}.
- No worker to which nothing happened waited longer than promised: {answer(in_time)}.
- The mean test loss, {_losses(losses)}, lies among those of as many runs without \
faults with the same tokens, {_losses(without)} ({len(calm)} seeds): {answer(among)}.

{fault_table(kinds, faults)}

{loss_table(rounds, calm)}

A step takes {first["pace"]:g} s at least, so that {first["workers"]} machines fit on \
one. `kill`: SIGKILL; `lose`: with its torchrun, back later; `preempt`: SIGTERM, back \
later; `stop`: SIGSTOP, later SIGCONT; `hang`: in Python, while it says that it lives; \
`part`: its W becomes another; `lighthouse`: away for a while.
"""
    return text, equal and in_time and among


def fault_table(kinds: list[str], faults: list[dict]) -> str:
    heading = ["times", "longest wait of others, s", "promised, s", "all are back after, s"]
    rows = [["fault", *heading]]
    for kind in kinds:
        of_kind = select(faults, kind=kind)
        backs = [one["back_after_seconds"] for one in of_kind if one["back_after_seconds"]]
        least, most = (pick(one["promised"] for one in of_kind) for pick in (min, max))
        wait = f"{max(one['longest_wait'] for one in of_kind):.1f}"
        limit = f"{least:.0f} to {most:.0f}" if least < most else f"{least:.0f}"
        back = f"{mean(backs):.1f}" if backs else "-"
        rows.append([kind, str(len(of_kind)), wait, limit, back])
    return markdown(rows)


def loss_table(rounds: list[dict], calm: list[dict]) -> str:
    rows = [["seed", "tokens", "test loss", "steps without faults", "tokens", "test loss"]]
    for one, other in zip(rounds, calm, strict=False):
        left = [str(one["seed"]), f"{one['tokens']:,}", f"{one['test_loss']:.4f}"]
        right = [f"{other['steps']:,}", f"{other['tokens']:,}", f"{other['test_loss']:.4f}"]
        rows.append([*left, *right])
    return markdown(rows, text_columns=0)


def promised(fault: dict, earlier: list[dict], pace: float) -> float:
    """Seconds that others wait at most for a fault.

    One that hangs ends itself by its longest step, which is as long as it stood still in one.
    """
    stops = select(earlier, kind="stop", round=fault["round"], worker=fault["worker"])
    stood_still = max((one["lasts"] for one in stops), default=0.0)
    return bound(fault["kind"], fault["lasts"], pace + stood_still)


def _losses(losses: list[float]) -> str:
    return f"{mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})" if losses else "none"


if __name__ == "__main__":
    sys.exit(command(__doc__, LOG, chaos, draw, OPTIONS))
