"""A switch that holds every frame back: joins namespaces over links with a delay. Linux, root.

    python scripts/delayed_switch.py --delay SECONDS NAMESPACE...

Makes a TAP device eth0 in each of the network namespaces, writes `ready`, and passes frames between
them until its standard input ends, as it does when the process that holds it ends. The devices
vanish with it. If they cannot be made, it writes why, in one line, and ends with status 1.
"""

import argparse
import ctypes
import errno
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME = 65_535  # bytes, the most that a TAP device takes
LOST = (errno.EAGAIN, errno.EIO, errno.ENETDOWN)  # of a frame for a device that is full, or not up


def enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_tap(namespace: str) -> int:
    """The descriptor of a new TAP device in the namespace; it lasts as long as the descriptor."""
    with open("/proc/self/ns/net") as here, open(f"/run/netns/{namespace}") as there:
        enter(there.fileno())
        try:
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
        finally:
            enter(here.fileno())
    return tap


def write(tap: int, frame: bytes) -> None:
    try:
        os.write(tap, frame)
    except OSError as error:
        if error.errno not in LOST:
            raise


def forward(taps: list[int], delay: float, end: int) -> None:
    """Pass frames on, each `delay` seconds after it came, until `end` has something to read.

    A frame goes to where its receiver has sent from, and if that is unknown to all but its sender.
    """
    held = deque()  # as they came: when to pass it on, from where, the frame
    places = {}  # of Ethernet addresses
    while True:
        # epoll and poll would wait whole milliseconds.
        wait = max(0, held[0][0] - time.monotonic()) if held else None
        ready, _, _ = select.select([end, *taps], [], [], wait)
        if end in ready:
            return
        for tap in ready:
            with suppress(BlockingIOError):
                frame = os.read(tap, FRAME)
                held.append((time.monotonic() + delay, tap, frame))
                places[frame[6:12]] = tap
        now = time.monotonic()
        while held and held[0][0] <= now:
            _, source, frame = held.popleft()
            receiver = places.get(frame[:6])
            for tap in [receiver] if receiver else taps:
                if tap != source:
                    write(tap, frame)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--delay", type=float, required=True, help="seconds")
    parser.add_argument("namespaces", metavar="NAMESPACE", nargs="+")
    options = parser.parse_args()
    try:
        taps = [open_tap(namespace) for namespace in options.namespaces]
    except OSError as error:
        print(error.strerror)
        return 1
    with suppress(PermissionError):  # then frames come late where the nodes keep processors busy
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    print("ready", flush=True)
    forward(taps, options.delay, sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
