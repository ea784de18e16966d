"""scripts/soak/run.py for a machine that may be slow, or too fast for a fault to be felt.

Workers wait longer for one another, though faults last no longer; and a disk that was full counts
when a worker has said so, not when the run has ended before.
"""

import sys

from run import PATIENCE

from scripts.soak import faults, job, run

TIMEOUT = 60


def main() -> int:
    draws, fill, share = run.draws, faults.Soak.fill, faults.TIMEOUT / TIMEOUT
    run.draws = lambda *which: [one | {"lasts": share * one["lasts"]} for one in draws(*which)]
    faults.Soak.fill = lambda soak, *fault: fill(soak, *fault) and soak.errors(1)
    faults.TIMEOUT, job.LAUNCH_SECONDS = TIMEOUT, PATIENCE
    return run.main()


if __name__ == "__main__":
    sys.exit(main())
