"""train.py, with rank 0's memory after every step: torchrun's `memory.py FILE KEY=VALUE ...`.

FILE gets a JSON list of resident KiB, one number per step.
"""

import json
import math
import os
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import train
from scripts.netns import Network
from training.workers import exit_process

STEPS, BLOCKS = 500, 10
WARM_UP = 1000  # steps in which memory still grows to what the allocator keeps
STUDENT_95 = 2.306  # the two-sided 95 % quantile for BLOCKS - 2 degrees of freedom


def measure(network: Network, folder: Path, overrides: list[str]) -> dict:
    """The slope of rank 0's memory in KiB per step, with the half width of its 95 % interval.

    It is that of a line through the means of BLOCKS blocks of the last STEPS steps: unlike single
    steps, blocks hardly depend on each other. The run leaves its directory in `folder`.
    """
    file = folder / "memory.json"
    steps = [f"steps={WARM_UP + STEPS}", f"directory={folder}/memory"]
    network.torchrun(__file__, file, *overrides, *steps, timeout=1200)
    kib = json.loads(file.read_text())
    means = np.reshape(kib[WARM_UP:], (BLOCKS, -1)).mean(1)
    centres = (np.arange(BLOCKS) + 0.5) * STEPS / BLOCKS
    (slope, _), covariance = np.polyfit(centres, means, 1, cov=True)
    return {
        "record": "memory",
        "slope_kib": slope,
        "slope_95_kib": STUDENT_95 * math.sqrt(covariance[0, 0]),
        "kib": kib,
    }


def resident_kib() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def main() -> int:
    file, kib, step = Path(sys.argv.pop(1)), [], train.Run.step

    def measured(run):
        loss = step(run)
        kib.append(resident_kib())
        return loss

    train.Run.step = measured
    status = train.main()
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(kib))
    return status


if __name__ == "__main__":
    exit_process(main())
