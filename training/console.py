"""What a run prints: lines, and its progress. A reader that goes away does not end the run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm


class Lenient:
    """A text stream that drops what cannot be written: its reader is gone, or its disk is full.

    It warns once, on the `other` stream. None, which is the stream of a process that was started
    without one, counts as a stream that nobody reads.
    """

    def __init__(self, stream: TextIO | None, name: str, other: TextIO | None):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115, open until the process ends
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
        except (
            OSError,
            ValueError,
        ) as error:  # ValueError: it is closed, or cannot encode it
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
    """Inside it, printing never fails because of its reader."""
    before = sys.stdout, sys.stderr
    sys.stdout = Lenient(before[0], "standard output", before[1])
    sys.stderr = Lenient(before[1], "standard error", before[0])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def write_line(text: str, error: bool = False) -> None:
    """Print a line, above the progress bar if there is one. error: whether on standard error."""
    stream = sys.stderr if error else sys.stdout
    with tqdm.external_write_mode(stream):
        print(text, file=stream, flush=True)


class Display:
    """The progress of `steps` steps, on standard error, from step `done` on.

    It is a bar on a terminal, and one line per record elsewhere, as in a file.
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
        """Move the bar to this step."""
        self._bar.update(step - self._bar.n)

    def describe(self, step: int, text: str) -> None:
        """Print a text about the training."""
        if self._bar.disable:
            print(f"step {step:>6} of {self.steps}  {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()
