"""train.py, as a machine of its own in chaos: `worker.py SECONDS ARGUMENT ...`.

A step takes at least so many seconds, so that several workers do not fight for one machine. SIGUSR1
makes the process hang in Python, while threads of torchft's say that it lives; after SIGUSR2 it has
another W than the others.
"""

import signal
import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from training.workers import exit_process

FOR_EVER = 1e6  # seconds
APART = 1e-3


def main() -> int:
    pace = float(sys.argv.pop(1))
    step, parts = train.Run.step, []

    def paced(run: train.Run):
        until = time.monotonic() + pace
        if parts:
            parts.clear()
            run.optimizer.batches[0].state["global_params"].add_(APART)
        loss = step(run)
        time.sleep(max(0.0, until - time.monotonic()))
        return loss

    train.Run.step = paced
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(FOR_EVER))
    signal.signal(signal.SIGUSR2, lambda *_: parts.append(True))
    return train.main()


if __name__ == "__main__":
    exit_process(main())
