"""A soak: a tiny run, again and again, under random faults, must end as it does without any.

    sudo python scripts/soak/run.py [--faults 30] [--minutes 20] [--seed 0] [KEY=VALUE ...]

Two workers on two nodes, which are network namespaces of this machine (scripts/netns.py), train on
a small file system of their own, mounted from a file. Faults come at random times, those of a seed
always in the same order; torchrun restarts the workers, or the job is launched again, with
resume=auto, until the run is completed. Then its log, but for times, and its last checkpoint have
to equal those of a run without faults, bit for bit. The memory of rank 0 over 500 undisturbed steps
is measured too. Needs root on Linux, iproute2 and e2fsprogs; what was made is removed at the end,
also by SIGINT and SIGTERM. Exits with 1 if a round differs or fewer faults happened.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TextIO

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.netns import Network, requirements_missing
from scripts.soak import disk
from scripts.soak.disk import Disk
from scripts.soak.faults import KINDS, Soak, draws
from scripts.soak.memory import measure
from scripts.soak.outcome import outcome
from scripts.soak.report import report
from training.config import ROOT

OUTPUT = ROOT / "results" / "soak"
TINY = [
    *("model.layers=1", "model.width=32", "model.heads=2", "model.context=32"),
    *("batch.global_size=4", "batch.micro_size=1", "eval.tokens=320"),
    *("compressor@w2s=topk", "compressor@s2w=topk"),
]
ROUND = [
    *("steps=120", "eval.every=20", "log_every=1", "check_every=20"),
    *("checkpoint.every=4", "checkpoint.keep=3", "resume=auto"),
]


def soak(options: argparse.Namespace, log: TextIO) -> list[dict]:
    """All rounds; what came of them goes to the log, and is returned."""
    records = []

    def write(*new: dict) -> None:
        records.extend(new)
        log.writelines(json.dumps(record) + "\n" for record in new)
        log.flush()

    with tempfile.TemporaryDirectory(prefix="ef21-soak-") as folder, Network(2) as network:
        if options.memory:
            often = "checkpoint.every=20"
            write(measure(network, Path(folder), [*TINY, *ROUND, often, *options.overrides]))
        output = Path(folder, "output")
        output.touch()
        faults = draws(options.faults, options.kinds.split(","), options.seed)
        arguments = [*TINY, *ROUND, *options.overrides]
        with Disk() as disk:
            run = Soak(network, disk, output, arguments, faults, options.minutes)
            run.round(0)
            undisturbed, number = outcome(run.directory), 0
            while run.due():
                number += 1
                before = len(run.records)
                run.round(number)
                equal = outcome(run.directory) == undisturbed
                write(*run.records[before:], {"record": "round", "round": number, "equal": equal})
        facts = {"faults": len(run.records), "launches": run.launches, "seconds": run.seconds()}
        equal = all(record["equal"] for record in records if record["record"] == "round")
        write({"record": "end", "seed": options.seed, "equal": equal} | facts)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--faults", type=int, default=30, help="(default %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="at most, for faults to begin")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder (default %(default)s)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--redraw", action="store_true", help="README.md from soak.jsonl alone")
    options = parser.parse_intermixed_args()
    if options.redraw:
        lines = (options.out / "soak.jsonl").read_text().splitlines()
        (options.out / "README.md").write_text(report([json.loads(line) for line in lines]))
        return 0
    if missing := requirements_missing() or disk.requirements_missing():
        print(f"error: {missing}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "soak.jsonl").open("w") as log:
        records = soak(options, log)
    (options.out / "README.md").write_text(report(records))
    end = records[-1]
    print(f"{end['faults']} faults in {end['seconds']:.0f} s, equal: {end['equal']}")
    return 0 if end["equal"] and end["faults"] == options.faults else 1


if __name__ == "__main__":
    sys.exit(main())
