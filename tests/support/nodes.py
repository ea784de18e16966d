"""Nodes of a network of namespaces: processes in them, how long they send, what they leave."""

import subprocess
import sys
from pathlib import Path

from run import PATIENCE

from scripts.netns import Network

ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 20):
    pass
connection.sendall(b".")
"""
CLIENT = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5000))
start = time.perf_counter()
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print(time.perf_counter() - start)
"""


def namespaces(pid: int) -> list[str]:
    """Those that the networks of a process have now."""
    return [path.name for path in Path("/var/run/netns").glob(f"ef21-{pid}-*")]


def processes(text: str) -> list[str]:
    """Command lines of running processes that contain `text`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if text in line]


def in_node(network: Network, node: int, code: str, *arguments: object) -> subprocess.Popen:
    """A Python process in a node."""
    return subprocess.Popen(
        ["ip", "netns", "exec", network.names[node], sys.executable, "-c", code]
        + [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


def seconds_to_send(network: Network, size: int) -> float:
    """Seconds from node 0's first byte of `size` until node 1's answer to the last."""
    server = in_node(network, 1, ECHO, network.addresses[1])
    assert server.stdout.readline() == "ready\n"
    client = in_node(network, 0, CLIENT, network.addresses[1], size)
    output, _ = client.communicate(timeout=PATIENCE)
    server.wait(PATIENCE)
    return float(output)
