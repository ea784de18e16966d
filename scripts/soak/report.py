"""results/soak/README.md, from the records of a soak alone."""

import re

from scripts.soak.memory import WARM_UP

RESUMED = ("going on from", "resuming from")  # as earlier versions say it, and today's


def report(records: list[dict]) -> str:
    """What happened in sentences, and a table of the faults."""
    end = records[-1]
    memory = [record for record in records if record["record"] == "memory"]
    faults = [record for record in records if record["record"] == "fault"]
    rounds = sum(record["record"] == "round" for record in records)
    text = [
        "# Soak\n",
        f"`sudo python scripts/soak/run.py --faults {end['faults']} --seed {end['seed']}`: "
        f"{end['faults']} faults in {rounds} rounds of a run of two workers on two nodes, "
        f"{end['launches']} launches, {end['seconds']:.0f} s. Log and last checkpoint of every "
        f"round equal those of the run without faults, bit for bit: "
        f"**{'yes' if end['equal'] else 'NO'}**.\n",
    ]
    for one in memory:
        kib = one["kib"]
        text.append(
            f"Memory of rank 0 in an undisturbed run: {kib[0]:,} KiB after the first step, "
            f"{kib[WARM_UP]:,} KiB after {WARM_UP}, {kib[-1]:,} KiB after {len(kib)}. Slope over "
            f"the last {len(kib) - WARM_UP} steps: {one['slope_kib']:.3f} +- "
            f"{one['slope_95_kib']:.3f} KiB per step (95 %).\n"
        )
    text += [
        "| s | round | fault | rank | newest checkpoint | resumed from | what the workers said |",
        "| ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for fault in faults:
        resumed = [line[-8:] for line in fault["said"] if line.startswith(RESUMED)]
        said = [
            re.sub(r": (see|go on|resume|start) .*|; earlier .*", "", line)
            for line in fault["said"]
        ]
        said = [line for line in said if not line.startswith(RESUMED)]
        cells = [fault["seconds"], fault["round"], fault["kind"], fault["rank"]]
        cells += [", ".join(names) or "-" for names in (fault["newest"], resumed, said)]
        text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*text, ""])
