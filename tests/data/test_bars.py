"""Progress bars in a file, where nobody watches them."""

import io
import sys

import pytest

from data import bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "most"), [(io.StringIO, 4), (Terminal, 10**9)])
def test_a_bar_in_a_file_is_written_once_a_minute(monkeypatch, stream, most):
    seconds = iter(range(10_000))
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # which would look by itself
    monkeypatch.setattr(sys, "stderr", shown := stream())
    progress = bars.bar(total=150, unit="shard")
    progress._time, progress.miniters = lambda: next(seconds), 1
    progress.start_t = progress.last_print_t = 0
    for _ in range(150):
        progress.update()
    progress.close()
    times = shown.getvalue().count("\r")
    assert times <= most and (times > 100) == (most > 100)
