"""scripts/soak/run.py for a machine that may be slow: workers wait longer for one another."""

import sys

from run import PATIENCE

from scripts.soak import rounds, run

if __name__ == "__main__":
    rounds.TIMEOUT, rounds.LAUNCH_SECONDS = 60, PATIENCE
    sys.exit(run.main())
