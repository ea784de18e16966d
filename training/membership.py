"""The configuration of a run's membership, and checks of it."""

import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from omegaconf import DictConfig

from training.workers import RunError

CONNECTION_SECONDS = 10.0  # that a machine may take to connect to itself


@dataclass
class MembershipConfig:
    """configs/membership. Every key except the name belongs to workers that come and go."""

    name: str
    workers: int | None = None
    worker: int | None = None
    lighthouse: str | None = None
    host: str | None = None


def check_membership(own: DictConfig, resume: str) -> None:
    """Raise RunError for values out of range, and for keys of the other membership."""
    if own.name == "fixed":
        for key in ("workers", "worker", "lighthouse", "host"):
            if own[key] is not None:
                raise RunError(
                    f"membership.{key}={own[key]} is not allowed with membership={own.name}: "
                    "workers that come and go need membership=torchft"
                )
        return
    for key in ("workers", "worker", "lighthouse"):
        if own[key] is None:
            raise RunError(
                f"membership.{key} has no value: give membership.{key}=VALUE, or start workers "
                "with scripts/fleet.py"
            )
    if own.workers < 1:
        raise RunError(
            f"membership.workers={own.workers} is not allowed: give a whole number of at least 1"
        )
    if not 0 <= own.worker < own.workers:
        raise RunError(
            f"membership.worker={own.worker} is not allowed: give one of 0 to {own.workers - 1}, "
            "each worker another"
        )
    _require_url(own.lighthouse)
    if resume != "auto":
        raise RunError(
            f"resume={resume} is not allowed with membership={own.name}: a worker that "
            "starts again resumes by itself, leave it at auto"
        )


def _require_url(lighthouse: str) -> None:
    try:
        url = urlsplit(lighthouse)
        fits = url.scheme == "http" and url.hostname and url.port and url.path in ("", "/")
    except ValueError:  # the port is out of range
        fits = False
    if not fits:
        raise RunError(
            f"membership.lighthouse={lighthouse} is not allowed: give http://HOST:PORT, with the "
            "machine and the port (1 to 65535) of scripts/fleet.py lighthouse"
        )


def require_addresses(own: DictConfig, patience: float) -> None:
    """Raise RunError unless the lighthouse's name has an address, and `membership.host` leads here.

    patience: seconds to wait for a resolver that does not answer. The lighthouse need not run yet.
    """
    given = f"membership.lighthouse={own.lighthouse}"
    url = urlsplit(own.lighthouse)
    _resolve(url.hostname, given, "give the name or address of its machine", patience)
    if own.host is not None:
        require_way_here(own.host, f"membership.host={own.host}", patience)


def require_way_here(host: str, given: str, patience: float) -> None:
    """Raise RunError unless connections to `host` reach this machine.

    given: what the error begins with, such as "membership.host=NAME".
    """
    hint = "give membership.host=NAME, by which the other workers reach this machine"
    address = _resolve(host, given, hint, patience)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server:
        port = server.getsockname()[1]
        try:
            socket.create_connection((address, port), timeout=CONNECTION_SECONDS).close()
        except OSError as error:
            raise RunError(f"{given} does not lead to this machine ({error}): {hint}") from error


def _resolve(host: str, given: str, hint: str, patience: float) -> str:
    """An address of the host. Raises RunError if it has none."""
    until = time.monotonic() + patience
    while True:
        try:
            return socket.getaddrinfo(host, None)[0][4][0]
        except (OSError, UnicodeError) as error:
            for_now = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            if not for_now or time.monotonic() > until:
                raise RunError(f"{given} has no address ({error}): {hint}") from error
        time.sleep(1)
