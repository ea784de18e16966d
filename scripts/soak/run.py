"""A soak: a tiny run, again and again, under random faults, must end as it does without any.

    sudo python scripts/soak/run.py [--faults 30] [--minutes 20] [--seed 0] [KEY=VALUE ...]

Two workers on two nodes, which are network namespaces of this machine (scripts/netns.py), train on
a small file system of their own, mounted from a file. Faults come at random times, those of a seed
always in the same order; torchrun restarts the workers, or the job is launched again, with
resume=auto, until the run is completed. Then its log, but for times, and its last checkpoint have
to equal those of a run without faults, bit for bit. Needs root on Linux, iproute2 and e2fsprogs;
what was made is removed at the end, also by SIGINT and SIGTERM. Exits with 1 if a round differs or
fewer faults happened.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts import faults
from scripts.faults import TINY, answer, draws, hand_in, outcome
from scripts.netns import Network, requirements_missing
from scripts.soak.rounds import KINDS, TIMEOUT, Soak, disk_missing, new_disk
from scripts.studies import command, markdown
from training.config import ROOT
from training.workers import RunError

LOG = ROOT / "results" / "soak" / "soak.jsonl"
OPTIONS = faults.options(KINDS, faults=30, minutes=20)
RUN = [
    *(*TINY, "batch.global_size=4", "batch.micro_size=1", "eval.tokens=320"),
    *("compressor@w2s=topk", "compressor@s2w=topk"),
    *("steps=120", "eval.every=20", "log_every=1", "check_every=20"),
    *("checkpoint.every=4", "checkpoint.keep=3", "resume=auto"),
]

RESUMED = ("going on from", "resuming from")  # as earlier versions say it, and today's
ADVICE = re.compile(r": (see|go on|resume|start) .*|; earlier .*")  # of what workers say


def details(generator: Random) -> dict:
    return {
        "rank": generator.randrange(2),
        "early": generator.random() < 0.2,  # perhaps before the first step
        "delay": round(generator.uniform(0, 4), 2),
        "lasts": round(generator.uniform(0.5, TIMEOUT / 2), 2),
        "place": generator.randrange(1 << 24),
    }


def soak(options: argparse.Namespace) -> Iterator[dict]:
    """The records of all rounds."""
    if missing := requirements_missing() or disk_missing():
        raise RunError(missing)
    arguments, all_equal = [*RUN, *options.overrides], True
    with (
        tempfile.TemporaryDirectory(prefix="ef21-soak-") as folder,
        Network(2) as network,
        new_disk() as disk,
    ):
        output, last_start = Path(folder, "output"), 60 * options.minutes
        run = Soak(network, disk, output, arguments, draws(options, details), last_start)
        run.round(0)
        undisturbed, number = outcome(run.directory), 0
        while run.due():
            number += 1
            before = len(run.records)
            run.round(number)
            equal = outcome(run.directory) == undisturbed
            all_equal = all_equal and equal
            yield from run.records[before:]
            yield {"record": "round", "round": number, "equal": equal}
    came = {"faults": len(run.records), "launches": run.launches, "seconds": run.seconds()}
    yield {"record": "end", "seed": options.seed, "equal": all_equal} | came
    if len(run.records) < options.faults:
        raise RunError(
            f"{len(run.records)} of {options.faults} faults happened in {options.minutes:g} "
            "minutes: give more --minutes, or --redraw for a page of these"
        )


def draw(records: list[dict], folder: Path) -> str:
    return hand_in(report(records), records[-1]["equal"], folder)


def report(records: list[dict]) -> str:
    """What happened in sentences, and a table of the faults."""
    end = records[-1]
    rounds = sum(record["record"] == "round" for record in records)
    heading = ["s", "round", "fault", "rank", "newest checkpoint", "resumed from"]
    faults = [_fault(record) for record in records if record["record"] == "fault"]
    table = markdown([[*heading, "what the workers said"], *faults], text_columns=(2, 6))
    return f"""# Soak

`sudo python scripts/soak/run.py --faults {end["faults"]} --seed {end["seed"]}`: \
{end["faults"]} faults in {rounds} rounds of a run of two workers on two nodes, \
{end["launches"]} launches, {end["seconds"]:.0f} s. Log and last checkpoint of every \
round equal those of the run without faults, bit for bit: {answer(end["equal"])}.

{table}
"""


def _fault(record: dict) -> list[str]:
    resumed = [line[-8:] for line in record["said"] if line.startswith(RESUMED)]
    said = [ADVICE.sub("", line) for line in record["said"] if not line.startswith(RESUMED)]
    lists = (", ".join(names) or "-" for names in (record["newest"], resumed, said))
    numbers = (record["seconds"], record["round"], record["kind"], record["rank"])
    return [*map(str, numbers), *lists]


def main(arguments: Sequence[str] | None = None) -> int:
    return command(__doc__, LOG, soak, draw, OPTIONS, arguments)


if __name__ == "__main__":
    sys.exit(main())
