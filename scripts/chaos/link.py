"""Workers that come and go over slow links: one is cut off twice, and the others continue.

    sudo python scripts/chaos/link.py [KEY=VALUE ...]

Three nodes, which are network namespaces of this machine (scripts/netns.py), at 10 Mbit/s with 50
ms from node to node. Records go to results/chaos/link.jsonl, and into README.md beside it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.chaos.crew import Crew
from scripts.chaos.faults import longest_wait
from scripts.chaos.report import LOG, draw
from scripts.faults import agreement, cut
from scripts.netns import Network, requirements_missing
from scripts.studies import OVERRIDES, command
from training.workers import RunError

RATE, DELAY = "10mbit", "50ms"
EVERY = 20
MODEL = [
    *("model.layers=1", "model.width=128", "model.heads=2", "model.context=32"),
    *("batch.global_size=6", "batch.micro_size=2", "eval.tokens=4096"),
    *("optimizer=local", f"optimizer.sync_every={EVERY}", "steps=900"),
    *("eval.every=300", "log_every=100", "checkpoint.every=300", "check_every=0"),
]
CUT_OFF, SECONDS = 1, 20  # which worker, twice for how long


def measure(options: argparse.Namespace) -> Iterator[dict]:
    if missing := requirements_missing():
        raise RunError(missing)
    yield {"record": "link", "rate": RATE, "delay": DELAY, "workers": 3}
    overrides = [*MODEL, *options.overrides]
    with (
        tempfile.TemporaryDirectory(prefix="ef21-link-") as folder,
        Network(3, RATE, DELAY) as network,
        Crew(3, Path(folder, "run"), overrides, 0.1, network) as crew,
    ):
        for _ in range(2):
            crew.wait_until_all_meet(crew.last_step() + 2 * EVERY)
            before, start = crew.last_step(), time.monotonic()
            with cut(network, CUT_OFF):
                time.sleep(SECONDS)
            during = crew.last_step()
            crew.wait_until_all_meet(during + 2 * EVERY)
            fault = {"kind": "cut", "worker": CUT_OFF, "lasts": SECONDS, "step": before}
            fault |= {"until_step": crew.last_step()}
            fault |= {"rounds_without": (during - before) // EVERY}
            fault |= {"back_after_seconds": round(time.monotonic() - start, 1)}
            yield {"record": "fault", **fault, **longest_wait(crew, fault)}
        crew.wait_until_all_end()
        yield {"record": "round", "seed": 0, **agreement([*map(crew.records, crew.jobs)])}


if __name__ == "__main__":
    sys.exit(command(__doc__, LOG.with_name("link.jsonl"), measure, draw, OVERRIDES))
