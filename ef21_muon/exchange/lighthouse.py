"""Whether the lighthouse answers, and what is said while it does not."""

import logging
import socket
import time
from concurrent.futures import Future
from urllib.parse import urlsplit

from ef21_muon.exchange.connections import ask

log = logging.getLogger("ef21_muon")

SILENCE = 10.0  # seconds, after which it is said
LOOK = 5.0  # seconds between looks, and for a connection


class Lighthouse:
    """One that is waited for, which is said once after SILENCE, and once when it is there again.

    quiet: say nothing, as on all ranks of a worker but the first.
    """

    def __init__(self, url: str, quiet: bool):
        self.url, self.quiet = url, quiet
        self._since: float | None = None  # without an answer
        self._said = False
        self._looking: Future | None = None
        self._looked = time.monotonic()

    def is_away(self) -> float:
        """Note that it gives no answer; for how many seconds now."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= SILENCE and not (self._said or self.quiet):
            self._said = True
            log.warning("no answer of the lighthouse %s so far: waiting for it", self.url)
        return now - self._since

    def answers(self) -> None:
        """Note that it does."""
        if self._said:
            log.warning("the lighthouse %s answers", self.url)
        self._since, self._said, self._looking = None, False, None
        self._looked = time.monotonic()

    def look(self) -> None:
        """See whether it takes connections, now and then, while a question to it is open.

        torchft asks again and again then, and says nothing. Does not wait.
        """
        if self._looking is None and time.monotonic() - self._looked > LOOK and not self.quiet:
            self._looking = ask(self._connect)
        elif self._looking and self._looking.done():
            away, self._looking = self._looking.exception() is not None, None
            self._looked = time.monotonic()
            if away:
                self.is_away()
            else:
                self.answers()

    def _connect(self) -> None:
        url = urlsplit(self.url)
        socket.create_connection((url.hostname, url.port), timeout=LOOK).close()
