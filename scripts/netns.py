"""A network of namespaces on this machine, and torchrun jobs on it. Needs root on Linux, iproute2.

    python scripts/netns.py --nodes 2 [--rate 100mbit] [--delay 1ms] SCRIPT [ARG ...]

Every node is a network namespace with one interface, eth0, on a common switch: a bridge in a
namespace of its own, or with a delay a process, scripts/delayed_switch.py. This machine's network
is not touched. The job is a real multi-node one, with a torchrun agent in each node and the
rendezvous over the link. What was made is removed when the command ends, also by SIGINT and
SIGTERM.
"""

import argparse
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# Jumbo frames, usual between training nodes. With offloads off, every frame pays for its headers,
# 66 bytes: 0.7 % of 9000 bytes, but 4.6 % of 1500.
MTU = 9000
ETHERNET_HEADER = 14  # bytes, beyond the MTU
# Frames that a node has sent and the delayed switch has not read yet. More than all TCP windows of
# a node hold: what finds the queue full is lost.
QUEUE = 10_000
DELAYED_SWITCH = Path(__file__).with_name("delayed_switch.py")
PORT = 29400
SECONDS_TO_FAIL_TOO = 3  # the node that names the cause is not always the first to end
SECONDS_TO_END = 30  # of a killed process
TAIL_LINES = 50
# Packets that several processors handle overtake each other, as they never do on a wire, and TCP
# sends again what it takes for lost: one processor receives them all.
KEEP_ORDER = "for f in /sys/class/net/*/queues/rx-0/rps_cpus; do test ! -e $f || echo 1 >$f; done"
STOPPING = (signal.SIGINT, signal.SIGTERM)
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1}


class JobError(RuntimeError):
    """A job that failed: where, and the end of the output there. `status` is the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Network:
    """`nodes` namespaces on one switch, for as long as the context lasts.

    nodes: 1 to 100; rate: of what a node sends, as in "100mbit" (bits per second; kept up to about
    1gbit), unlimited without; delay: one way, from one node to another, as in "1ms" (also us and
    s): a ping takes twice as long; mtu: bytes of a frame without its Ethernet header. `names` are
    the namespaces, `addresses` those of eth0.

    Raises ValueError for values out of range; on entry, RuntimeError for what the system refuses: a
    delay needs /dev/net/tun.
    """

    def __init__(
        self, nodes: int, rate: str | None = None, delay: str | None = None, mtu: int = MTU
    ):
        if not 1 <= nodes <= 100:
            raise ValueError(f"nodes={nodes} is not allowed: give a whole number from 1 to 100")
        if not 1280 <= mtu <= 65_535:
            raise ValueError(f"mtu={mtu} is not allowed: give bytes from 1280 to 65535")
        if rate is not None and not re.fullmatch(r"\d+(\.\d+)?[kmg]?bit", rate):
            raise ValueError(f"rate={rate} is not allowed: give bits per second, as in 100mbit")
        if delay is not None and not re.fullmatch(r"\d+(\.\d+)?(us|ms|s)", delay):
            raise ValueError(f"delay={delay} is not allowed: give a time, as in 1ms")
        self.rate, self.delay, self.mtu = rate, delay, mtu
        prefix = f"ef21-{os.getpid()}-{secrets.token_hex(3)}"
        self._switch = f"{prefix}-switch"
        self.names = [f"{prefix}-node{node}" for node in range(nodes)]
        # Of equal length: torchrun numbers the nodes by their addresses, sorted as text.
        self.addresses = [f"10.77.0.{100 + node}" for node in range(nodes)]

    def __enter__(self):
        self._handler = self._process = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, _exit)
        self._directory = tempfile.TemporaryDirectory(prefix="ef21-netns-")
        try:
            self._build()
            return self
        except BaseException:
            self._remove()
            raise

    def __exit__(self, *_):
        self._remove()

    def _build(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
        if self.delay:
            self._join_by_process()
        else:
            self._join_by_bridge()
        for name, address in zip(self.names, self.addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            # Segmentation offload off: with it the kernel counts one header for up to 64 KiB, but
            # on a wire every frame has its own, and the counter is to say what a wire carries.
            _link(name, "set eth0 gso_max_segs 1 up")
            _link(name, "set lo up")
            if self.rate:
                self._limit(name)
        for name in self._made():
            _run("ip", "netns", "exec", name, "sh", "-c", KEEP_ORDER)

    def _join_by_bridge(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _link(self._switch, "add bridge type bridge")
        _link(self._switch, "set bridge up")
        for node, name in enumerate(self.names):
            peer = f"peer name eth0 mtu {self.mtu} netns {name}"
            _link(self._switch, f"add port{node} mtu {self.mtu} type veth {peer}")
            _link(self._switch, f"set port{node} master bridge up")

    def _join_by_process(self) -> None:
        number, unit = re.fullmatch(r"([\d.]+)(\w+)", self.delay).groups()
        seconds = float(number) * SECONDS[unit]
        self._process = subprocess.Popen(
            [sys.executable, DELAYED_SWITCH, f"--delay={seconds}", *self.names],
            stdin=subprocess.PIPE,  # it ends with this process, however that ends
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then cleans up
        )
        if (line := self._process.stdout.readline().strip()) != "ready":
            raise RuntimeError(
                f"delay={self.delay} needs TAP devices, and /dev/net/tun gives none ({line}): "
                "load the kernel's module tun, or give no delay"
            )
        for name in self.names:
            _link(name, f"set eth0 mtu {self.mtu} txqueuelen {QUEUE}")

    def _limit(self, name: str) -> None:
        # A burst is what an idle link lets through at once: as little as keeps the rate.
        burst = 4 * (self.mtu + ETHERNET_HEADER)
        discipline = f"tbf rate {self.rate} burst {burst} latency 200ms"
        try:
            _run(*f"tc -n {name} qdisc add dev eth0 root {discipline}".split())
        except RuntimeError as error:
            raise RuntimeError(f"{error} (needs sch_tbf in the kernel)") from error

    def _made(self) -> set[str]:
        """The namespaces of this network that there are now."""
        there = {line.split()[0] for line in _run("ip", "netns", "list").splitlines()}
        return there.intersection([*self.names, self._switch])

    def _remove(self) -> None:
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            if self._process:
                self._process.kill()
                self._process.communicate()
            made = self._made()
            try:
                _kill_processes(made)
            finally:
                for name in made:
                    _run("ip", "netns", "delete", name)
        finally:
            self._directory.cleanup()
            if self._handler is not None:
                signal.signal(signal.SIGTERM, self._handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)

    def torchrun(
        self,
        script: str | Path,
        *arguments: object,
        ranks_per_node: int = 1,
        environment: dict[str, str] | None = None,
        timeout: float | None = None,
        show: bool = False,
    ) -> list[str]:
        """Run `script` as one job over all nodes, on the CPU with gloo; returns each node's output.

        environment: variables beside this process's; timeout: seconds for the whole job; show:
        node 0 writes to this process's output and error, and its output is returned empty.
        Node i has the ranks from i * ranks_per_node. All processes in the nodes are killed when the
        job ends. Raises JobError if a node fails or the time is over.
        """
        logs = [Path(self._directory.name, f"{name}.log") for name in self.names]
        agents = []
        try:
            for node, log in enumerate(logs):
                command = [*self._agent(node, ranks_per_node), str(script), *map(str, arguments)]
                with log.open("w") as file:
                    agent = subprocess.Popen(
                        command,
                        env=os.environ | self._environment | (environment or {}),
                        stdin=subprocess.DEVNULL,
                        stdout=None if show and node == 0 else file,
                        stderr=None if show and node == 0 else subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C is for this process, which then cleans up
                    )
                agents.append(agent)
            statuses = _wait(agents, timeout)
        finally:
            _kill_processes(self.names)
            for agent in agents:
                agent.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
        _require_success(Path(script).name, statuses, outputs, timeout)
        return outputs

    def _agent(self, node: int, ranks_per_node: int) -> list[str]:
        return [
            *("ip", "netns", "exec", self.names[node]),
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={len(self.names)}", f"--nproc_per_node={ranks_per_node}"),
            *("--rdzv_backend=c10d", f"--rdzv_endpoint={self.addresses[0]}:{PORT}", "--rdzv_id=0"),
            # All nodes have this machine's host name: say who hosts, and under which address.
            *(f"--rdzv_conf=is_host={int(node == 0)}", f"--local_addr={self.addresses[node]}"),
        ]

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # NCCL refuses nodes that share a GPU
            "TMPDIR": self._directory.name,
        }


def requirements_missing() -> str | None:
    """Why no network can be built here, in one line; None if it can."""
    if sys.platform != "linux":
        return f"this is {sys.platform}, network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root: start this as root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command {tool} is missing: install iproute2"
    try:
        with Network(1):
            return None
    except RuntimeError as error:  # root in a container without the right to make namespaces
        return str(error)


def _exit(number: int, _) -> None:
    raise SystemExit(128 + number)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {' '.join(result.stderr.split())}")
    return result.stdout


def _link(namespace: str, command: str) -> None:
    _run("ip", "-n", namespace, "link", *command.split())


def _kill_processes(namespaces: Iterable[str]) -> None:
    deadline = time.monotonic() + SECONDS_TO_END
    while processes := " ".join(_run("ip", "netns", "pids", name) for name in namespaces).split():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"killed processes have not ended in {SECONDS_TO_END} s: {' '.join(processes)}"
            )
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        time.sleep(0.01)


def _wait(agents: list[subprocess.Popen], timeout: float | None) -> list[int | None]:
    """The exit statuses when all have ended, one has failed or the time is over (then None)."""
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    failed = False
    while None in (statuses := [agent.poll() for agent in agents]):
        if not failed and any(statuses):
            failed = True
            deadline = min(deadline, time.monotonic() + SECONDS_TO_FAIL_TOO)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return statuses


def _require_success(
    script: str, statuses: list[int | None], outputs: list[str], timeout: float | None
) -> None:
    failed = [node for node, status in enumerate(statuses) if status]
    late = [node for node, status in enumerate(statuses) if status is None]
    if not failed and not late:
        return
    nodes = failed or late
    status = statuses[failed[0]] if failed else 124
    what = f"failed with status {status}" if failed else f"did not end in {timeout:g} s"
    message = f"{script} {what} on node {', '.join(map(str, nodes))}"
    for node in nodes:
        if tail := "\n".join(outputs[node].splitlines()[-TAIL_LINES:]):
            message += f"\n--- node {node} ---\n{tail}"
    raise JobError(message, status if status > 0 else 128 - status)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, required=True, help="1 to 100")
    parser.add_argument("--rate", help="of what a node sends, bits per second: 100mbit")
    parser.add_argument("--delay", help="one way, from one node to another: 1ms")
    parser.add_argument(
        "--mtu", type=int, default=MTU, help="bytes of a frame (default %(default)s)"
    )
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="ARG", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    try:
        if missing := requirements_missing():
            raise RuntimeError(missing)
        if not Path(options.script).is_file():
            raise ValueError(f"{options.script} is not a file: give a Python script")
        with Network(options.nodes, options.rate, options.delay, options.mtu) as network:
            network.torchrun(options.script, *options.arguments, show=True)
    except (ValueError, RuntimeError) as error:
        print(f"netns.py: {error}", file=sys.stderr)
        return error.status if isinstance(error, JobError) else 1
    except KeyboardInterrupt:
        return 128 + int(signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
