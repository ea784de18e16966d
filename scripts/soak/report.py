"""results/soak/README.md, from the records of a soak alone."""

import re
from pathlib import Path

from scripts.faults import answer, hand_in
from scripts.soak.memory import WARM_UP

RESUMED = ("going on from", "resuming from")  # as earlier versions say it, and today's
ADVICE = re.compile(r": (see|go on|resume|start) .*|; earlier .*")  # of what workers say


def draw(records: list[dict], folder: Path) -> str:
    return hand_in(report(records), records[-1]["equal"], folder)


def report(records: list[dict]) -> str:
    """What happened in sentences, and a table of the faults."""
    end = records[-1]
    rounds = sum(record["record"] == "round" for record in records)
    memory = "".join(_memory(record) for record in records if record["record"] == "memory")
    faults = "\n".join(_fault(record) for record in records if record["record"] == "fault")
    return f"""# Soak

`sudo python scripts/soak/run.py --faults {end["faults"]} --seed {end["seed"]}`: \
{end["faults"]} faults in {rounds} rounds of a run of two workers on two nodes, \
{end["launches"]} launches, {end["seconds"]:.0f} s. Log and last checkpoint of every \
round equal those of the run without faults, bit for bit: {answer(end["equal"])}.

{memory}| s | round | fault | rank | newest checkpoint | resumed from | what the workers said |
| ---: | ---: | --- | ---: | ---: | ---: | --- |
{faults}
"""


def _memory(record: dict) -> str:
    kib = record["kib"]
    return f"""Memory of rank 0 in an undisturbed run: {kib[0]:,} KiB after the first step, \
{kib[WARM_UP]:,} KiB after {WARM_UP}, {kib[-1]:,} KiB after {len(kib)}. Slope over \
the last {len(kib) - WARM_UP} steps: {record["slope_kib"]:.3f} +- \
{record["slope_95_kib"]:.3f} KiB per step (95 %).

"""


def _fault(record: dict) -> str:
    resumed = [line[-8:] for line in record["said"] if line.startswith(RESUMED)]
    said = [ADVICE.sub("", line) for line in record["said"] if not line.startswith(RESUMED)]
    lists = (", ".join(names) or "-" for names in (record["newest"], resumed, said))
    cells = (record["seconds"], record["round"], record["kind"], record["rank"], *lists)
    return f"| {' | '.join(map(str, cells))} |"
