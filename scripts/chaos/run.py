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
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.chaos.crew import Crew
from scripts.chaos.faults import FAULTS, draws
from scripts.chaos.outcome import longest_wait, outcome
from scripts.chaos.report import report
from training.config import ROOT, compose

OUTPUT = ROOT / "results" / "chaos"
LOG = "chaos.jsonl"
EVERY = 20  # steps
TINY = [
    *("model.layers=1", "model.width=32", "model.heads=2", "model.context=32"),
    *("batch.global_size=12", "batch.micro_size=2", "eval.tokens=32768"),
    *("optimizer=local", f"optimizer.sync_every={EVERY}"),
    *("eval.every=1000", "log_every=100", "checkpoint.every=500", "check_every=0"),
]


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def disturbed(crew: Crew, faults: list[dict], last_step: int, due) -> Iterator[dict]:
    """Let faults happen up to a step; yields each with what came of it."""
    while faults and due() and crew.wait_until_all_meet(crew.last_step() + 2 * EVERY):
        draw = faults[0]
        time.sleep(draw["delay"])
        before, start = crew.last_step(), time.monotonic()
        if before > last_step:
            break
        faults.pop(0)
        print(f"step {before}: {draw}", flush=True)
        FAULTS[draw["kind"]](crew, draw["worker"], draw["lasts"])
        after = crew.last_step() if draw["kind"] not in ("kill", "hang", "part") else before
        back = crew.wait_until_all_meet(after + 2 * EVERY)
        yield draw | {
            "record": "fault",
            "step": before,
            "back_after_seconds": round(time.monotonic() - start, 1) if back else None,
            "until_step": crew.last_step(),
        }


def read(path: Path) -> list[dict]:
    """Of a file that may not be there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: argparse.Namespace, write) -> None:
    """All rounds with faults, then those without."""
    faults = draws(options.faults, options.kinds.split(","), options.workers, options.seed)
    last_step = options.steps - options.calm / options.pace
    last_start = time.monotonic() + 60 * options.minutes
    rounds: list[dict] = []
    config = compose((*TINY, *options.overrides)).config
    tokens_a_step = config.batch.global_size * config.model.context
    with tempfile.TemporaryDirectory(prefix="ef21-chaos-") as folder:

        def train(name: str, steps: int, seed: int, pace: float) -> Crew:
            overrides = [*TINY, *options.overrides, f"steps={steps}", f"seed={seed}"]
            return Crew(options.workers, free_port(), Path(folder, name), overrides, pace)

        while faults and time.monotonic() < last_start:
            seed, start = len(rounds), time.monotonic()
            crew = train(f"faults{seed}", options.steps, seed, options.pace)
            try:
                for fault in disturbed(
                    crew, faults, last_step, lambda: time.monotonic() < last_start
                ):
                    write(fault | {"round": seed} | longest_wait(crew, fault))
                crew.wait_until_all_end()
                seconds = round(time.monotonic() - start, 1)
                rounds.append(
                    {"record": "round", "seed": seed, "seconds": seconds, **outcome(crew)}
                )
                write(rounds[-1])
            except BaseException:
                print(crew.news(), file=sys.stderr)
                raise
            finally:
                crew.close()
        for one in rounds:
            steps = EVERY * round(one["tokens"] / (EVERY * tokens_a_step))
            crew = train(f"calm{one['seed']}", steps, one["seed"], 0.0)
            try:
                crew.wait_until_all_end()
                calm = {key: outcome(crew)[key] for key in ("tokens", "test_loss")}
                write({"record": "calm", "seed": one["seed"], "steps": steps, **calm})
            finally:
                crew.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=60, help="(default %(default)s)")
    parser.add_argument("--minutes", type=float, default=40, help="at most, of faults")
    parser.add_argument("--workers", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=4200, help="of a round (default %(default)s)")
    parser.add_argument("--pace", type=float, default=0.1, help="seconds of a step, at least")
    parser.add_argument("--calm", type=float, default=40, help="seconds at the end of a round")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="of faults (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder (default %(default)s)")
    parser.add_argument("--redraw", action="store_true", help="README.md from the records alone")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    options = parser.parse_args()
    log = options.out / LOG
    if not options.redraw:
        options.out.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with log.open("w") as file:

            def write(record: dict) -> None:
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(json.dumps(record), flush=True)

            settings = {"workers": options.workers, "pace": options.pace, "steps": options.steps}
            write({"record": "start", "seed": options.seed, **settings})
            run(options, write)
            write({"record": "end", "seconds": round(time.monotonic() - start, 1)})
    text, holds = report(*(read(options.out / name) for name in (LOG, "link.jsonl", "cost.jsonl")))
    (options.out / "README.md").write_text(text)
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
