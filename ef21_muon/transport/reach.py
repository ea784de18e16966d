"""The address at which gloo listens in a process, and whether other machines reach it."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"  # the environment variable that names gloo's interface


@dataclass(frozen=True)
class Place:
    """Where a process is in the network.

    Attributes:
        host: the machine's name, or the name or address by which others reach it.
        address: the address at which gloo listens; None if GLOO_SOCKET_IFNAME chooses it.
        network: equal for processes that share their loopback addresses.
    """

    host: str
    address: str | None
    network: str

    @classmethod
    def here(cls, host: str | None = None) -> "Place":
        """The place of this process.

        Where neither `host` nor the machine's name leads to an address of this machine, gloo
        listens on a loopback address.

        Args:
            host: the name or address by which others reach this process; by default the machine's
                name, which gloo takes too.

        Raises:
            OSError: if no address of `host` is known.
        """
        name = socket.gethostname()
        if os.environ.get(INTERFACE):
            return cls(host or name, None, _network())
        address = _first_own(socket.getaddrinfo(host, None)) if host else None
        if address is None:
            with suppress(OSError):
                address = _first_own(socket.getaddrinfo(name, None))
        return cls(host or name, address or LOOPBACK, _network())

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine can reach it."""
        return self.address is not None and ipaddress.ip_address(self.address).is_loopback


def cut_off(places: Sequence[Place]) -> list[int]:
    """The indices of places with a loopback address, if not all places are on one machine."""
    if len({place.network for place in places}) == 1:
        return []
    return [number for number, place in enumerate(places) if place.is_loopback]


def is_local(host: str) -> bool:
    """Whether a name or an address leads every machine to itself, as `localhost` does."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def _first_own(found: list[tuple]) -> str | None:
    """The first of these results of getaddrinfo that is an address of this machine."""
    for family, kind, _, _, address in found:
        with suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return address[0]
    return None


def _network() -> str:
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{machine} {os.readlink('/proc/self/ns/net')}"
    except OSError:  # another system than Linux
        return socket.gethostname()
