"""What a run prints: lines, and its progress. Its readers may leave without ending the run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm


class Lenient:
    """A text stream that drops what cannot be written: its reader is gone, or its disk is full.

    It says so once, on the `other` stream. None, as of a process that was started without the
    stream, counts as one that nobody reads.
    """

    def __init__(self, stream: TextIO | None, name: str, other: TextIO | None):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115, as long as the process
        self._name, self._other = name, other

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _try(self, action) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: of a closed file, or of its encoding
            other, self._other = self._other, None
            if other:
                with suppress(OSError, ValueError):
                    print(
                        f"warning: {self._name} cannot be written ({error}): the run continues",
                        file=other,
                        flush=True,
                    )


@contextmanager
def lenient_output() -> Iterator[None]:
    """In it, nothing that prints fails for its reader's sake."""
    before = sys.stdout, sys.stderr
    sys.stdout = Lenient(before[0], "standard output", before[1])
    sys.stderr = Lenient(before[1], "standard error", before[0])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def write_line(text: str, error: bool = False) -> None:
    """Print a line above the bar, if there is one; `error`: on standard error."""
    stream = sys.stderr if error else sys.stdout
    with tqdm.external_write_mode(stream):
        print(text, file=stream, flush=True)


class Display:
    """The progress of `steps` steps, on standard error, from step `done` on.

    A bar on a terminal; elsewhere, as in a file, a line at each record.
    """

    def __init__(self, steps: int, done: int):
        self.steps = steps
        self._bar = tqdm(
            total=steps,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def advance(self, step: int) -> None:
        """As far as this step."""
        self._bar.update(step - self._bar.n)

    def describe(self, step: int, text: str) -> None:
        """Say how the training goes."""
        if self._bar.disable:
            print(f"step {step:>6} of {self.steps}  {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()
