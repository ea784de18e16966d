"""Progress bars of commands that run for hours: in a file they are written once a minute."""

import sys

from tqdm import tqdm

SECONDS = 60.0


def bar(*arguments, **options) -> tqdm:
    """tqdm's, on standard error, with its own arguments and options."""
    if not (sys.stderr and sys.stderr.isatty()):
        options |= {"mininterval": SECONDS, "maxinterval": SECONDS}
    return tqdm(*arguments, **options)
