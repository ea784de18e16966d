"""Networks with a delay: how long a frame takes, that each arrives once, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from nodes import in_node, namespaces, processes, seconds_to_send
from run import PATIENCE, ROOT
from waiting import wait_until

from scripts.count_bytes import HEADERS
from scripts.netns import ETHERNET_HEADER, MTU, Network, requirements_missing

MISSING = requirements_missing()
if MISSING is None and not Path("/dev/net/tun").exists():
    MISSING = "a delay needs /dev/net/tun"
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

ECHO_DATAGRAMS = """
import socket, sys
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind((sys.argv[1], 5000))
print("ready", flush=True)
while True:
    server.sendto(*server.recvfrom(1))
"""
PING = """
import socket, sys, time
client = socket.socket(type=socket.SOCK_DGRAM)
client.connect((sys.argv[1], 5000))
for _ in range(5):
    start = time.perf_counter()
    client.send(b".")
    client.recv(1)
    print(time.perf_counter() - start)
"""
HOLD = f"""
import time
from scripts.netns import Network
with Network(2, delay="1ms"):
    print("ready", flush=True)
    time.sleep({PATIENCE})
"""
QUIET = "f=/proc/sys/net/ipv6/conf/eth0/disable_ipv6; test ! -e $f || echo 1 >$f"
WITHOUT_TUN = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]


def round_trips(network: Network) -> list[float]:
    """Seconds of datagrams from node 0 to node 1 and back; before the first, they find each other.

    At its end nothing is under way between them that they had sent before.
    """
    server = in_node(network, 1, ECHO_DATAGRAMS, network.addresses[1])
    assert server.stdout.readline() == "ready\n"
    output, _ = in_node(network, 0, PING, network.addresses[1]).communicate(timeout=PATIENCE)
    server.kill()
    server.wait(PATIENCE)
    return [float(line) for line in output.splitlines()]


def counters(network: Network, node: int) -> Counter:
    """The kernel's, of eth0: ("rx", "bytes"), ("tx", "dropped") and so on."""
    command = ["ip", "-n", network.names[node], "-statistics", "-json", "link", "show", "eth0"]
    (link,) = json.loads(subprocess.check_output(command))
    ways = link["stats64"].items()
    return Counter({(way, what): count for way, of in ways for what, count in of.items()})


@pytest.mark.parametrize("delay", [0.0005, 0.05])
def test_a_round_trip_is_two_delays(delay, nothing_left):
    with Network(2, delay=f"{delay * 1e6:.0f}us") as network:
        assert 2 * delay <= min(round_trips(network)) < 2 * delay + 0.1


def test_delay_with_rate(nothing_left):
    """The last byte leaves when the rate lets it, and it and the answer wait."""
    size, rate, burst, delay = 500_000, 40e6, 4 * (MTU + ETHERNET_HEADER), 0.05
    with Network(2, rate="40mbit", delay="50ms") as network:
        assert seconds_to_send(network, size) >= (size - burst) * 8 / rate + 2 * delay


def test_delayed_frames_arrive_once_each(nothing_left):
    """By the kernel's counters, and not at a third node. Without IPv6 nothing is sent unasked."""
    size = 1_000_000
    with Network(3, delay="5ms") as network:
        for name in network.names:
            subprocess.run(["ip", "netns", "exec", name, "sh", "-c", QUIET], check=True)
        round_trips(network)
        before = [counters(network, node) for node in range(3)]
        seconds_to_send(network, size)

        def since() -> list[Counter]:
            return [counters(network, node) - before[node] for node in range(3)]

        def all_arrived() -> bool:
            sender, receiver, _ = [(of["tx", "bytes"], of["rx", "bytes"]) for of in since()]
            return sender == receiver[::-1]

        wait_until(all_arrived)
        sender, receiver, third = since()
    sent, frames = sender["tx", "bytes"], sender["tx", "packets"]
    assert sent <= frames * (MTU + ETHERNET_HEADER), "frames were counted unsegmented"
    assert sent - HEADERS * frames > 0.999 * size
    assert third["rx", "bytes"] < 1000
    for node in (sender, receiver, third):
        assert not node["rx", "dropped"] and not node["tx", "dropped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_delayed_switch_ends_with_its_network(number, tmp_path, nothing_left):
    """Killed, it leaves its namespaces, without devices."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "ready\n"
        assert len(processes(f"ef21-{holder.pid}-")) == 1
        holder.send_signal(number)
    wait_until(lambda: not processes(f"ef21-{holder.pid}-"))
    left = namespaces(holder.pid)
    assert len(left) == (2 if number == signal.SIGKILL else 0)
    for name in left:
        links = ["ip", "-n", name, "link"]
        wait_until(lambda links=links: b"eth0" not in subprocess.check_output(links))
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_a_delay_without_tap_devices(nothing_left):
    command = [*WITHOUT_TUN, sys.executable, "scripts/netns.py", "--nodes=2", "--delay=1ms"]
    result = subprocess.run([*command, __file__], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        "netns.py: delay=1ms needs TAP devices, and /dev/net/tun gives none (No such file or "
        "directory): load the kernel's module tun, or give no delay\n"
    )
