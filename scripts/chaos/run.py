"""Chaos: workers die, hang, stop, part and come back at random times, and the run continues.

    python scripts/chaos/run.py [--faults 60] [--workers 4] [--seed 0] [KEY=VALUE ...]

Rounds of a run of local steps by workers that come and go (scripts/fleet.py), each with a seed of
its own, until so many faults have happened; a fault comes when all workers have met again after the
last. Then every round's W has to be the same on all workers, bit for bit, no worker to which
nothing happened may have waited longer than promised (faults.py), and the test loss has to lie
among those of runs without faults: as many, of the same seeds, of as many steps as have the same
tokens. Four machines on one: a step takes at least --pace seconds. Exits with 1 if one of that does
not hold.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts import faults
from scripts.chaos.crew import Crew
from scripts.chaos.faults import FAULTS, longest_wait
from scripts.chaos.report import LOG, draw
from scripts.faults import TINY, agreement, draws
from scripts.studies import command
from training.config import compose

EVERY = 20  # steps
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
    last_start, last_step = (
        start + 60 * options.minutes,
        options.steps - options.calm / options.pace,
    )
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


def shown(options: argparse.Namespace) -> Iterator[dict]:
    for record in chaos(options):
        print(json.dumps(record), flush=True)
        yield record


if __name__ == "__main__":
    sys.exit(command(__doc__, LOG, shown, draw, OPTIONS))
