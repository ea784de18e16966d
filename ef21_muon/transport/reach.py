"""At which address gloo listens in a process, and whether other machines reach it."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"  # the variable that names one for gloo, whatever the host's name


@dataclass(frozen=True)
class Place:
    """Where a process is.

    host: the machine's name, or by which others reach it; address: at which gloo listens, None if
    GLOO_SOCKET_IFNAME chooses it; network: equal for processes with the same loopback addresses.
    """

    host: str
    address: str | None
    network: str

    @classmethod
    def here(cls, host: str | None = None) -> "Place":
        """This process, reached by `host`; by default by its machine's name, as gloo has it.

        Where neither is an address of this machine, gloo listens on a loopback address. Raises
        OSError for a `host` that no address is known of.
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
        """Whether no other machine reaches it."""
        return self.address is not None and ipaddress.ip_address(self.address).is_loopback


def cut_off(places: Sequence[Place]) -> list[int]:
    """Which of the places listen on a loopback address, while others are on other machines."""
    if len({place.network for place in places}) == 1:
        return []
    return [number for number, place in enumerate(places) if place.is_loopback]


def is_local(host: str) -> bool:
    """Whether a name or an address is one of every machine for itself, as `localhost` is."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def _first_own(found: list[tuple]) -> str | None:
    """The first of these addresses that this machine has."""
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
