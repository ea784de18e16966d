"""A network of namespaces on this machine, and torchrun jobs on it. Needs root on Linux, iproute2.

    python scripts/netns.py --nodes 2 [--rate 100mbit] [--delay 1ms] SCRIPT [ARG ...]

Every node is a network namespace with one interface, eth0, on a common switch: a bridge in a
namespace of its own, or with a delay a process, scripts/delayed_switch.py. This machine's network
is not touched. The job is a real multi-node one, with a torchrun agent in each node and the
rendezvous over the link. What was made is removed when the command ends, also by SIGINT and
SIGTERM.
"""

import argparse
import math
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
from collections.abc import Callable, Iterable, Sequence
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
    s): a ping takes twice as long. `names` are the namespaces, `addresses` those of eth0.

    Raises ValueError for values out of range; on entry, RuntimeError for what the system refuses: a
    delay needs /dev/net/tun.
    """

    def __init__(self, nodes: int, rate: str | None = None, delay: str | None = None):
        if not 1 <= nodes <= 100:
            raise ValueError(f"nodes={nodes} is not allowed: give a whole number from 1 to 100")
        if rate is not None and not re.fullmatch(r"\d+(\.\d+)?[kmg]?bit", rate):
            raise ValueError(f"rate={rate} is not allowed: give bits per second, as in 100mbit")
        if delay is not None and not re.fullmatch(r"\d+(\.\d+)?(us|ms|s)", delay):
            raise ValueError(f"delay={delay} is not allowed: give a time, as in 1ms")
        self.rate, self.delay = rate, delay
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
        self.directory = self._directory.name
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
            _ip(f"netns add {name}")
        if self.delay:
            self._join_by_process()
        else:
            self._join_by_bridge()
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip(f"-n {name} address add {address}/24 dev eth0")
            # Segmentation offload off: with it the kernel counts one header for up to 64 KiB, but
            # on a wire every frame has its own, and the counter is to say what a wire carries.
            _ip(f"-n {name} link set eth0 gso_max_segs 1 up")
            _ip(f"-n {name} link set lo up")
            if self.rate:
                self._limit(name)
        for name in self._made():
            output_of("ip", "netns", "exec", name, "sh", "-c", KEEP_ORDER)

    def run(self, node: int, *command: str) -> str:
        """What a command prints in a node. Raises RuntimeError if it fails."""
        return output_of("ip", "netns", "exec", self.names[node], *command)

    def _join_by_bridge(self) -> None:
        _ip(f"netns add {self._switch}")
        _ip(f"-n {self._switch} link add bridge type bridge")
        _ip(f"-n {self._switch} link set bridge up")
        for node, name in enumerate(self.names):
            peer = f"peer name eth0 mtu {MTU} netns {name}"
            _ip(f"-n {self._switch} link add port{node} mtu {MTU} type veth {peer}")
            _ip(f"-n {self._switch} link set port{node} master bridge up")

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
            _ip(f"-n {name} link set eth0 mtu {MTU} txqueuelen {QUEUE}")

    def _limit(self, name: str) -> None:
        # A burst is what an idle link lets through at once: as little as keeps the rate.
        burst = 4 * (MTU + ETHERNET_HEADER)
        discipline = f"tbf rate {self.rate} burst {burst} latency 200ms"
        try:
            output_of(*f"tc -n {name} qdisc add dev eth0 root {discipline}".split())
        except RuntimeError as error:
            raise RuntimeError(f"{error} (needs sch_tbf in the kernel)") from error

    def _made(self) -> set[str]:
        """The namespaces of this network that there are now."""
        there = {line.split()[0] for line in _ip("netns list").splitlines()}
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
                    _ip(f"netns delete {name}")
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
        timeout: float = math.inf,
        show: bool = False,
    ) -> list[str]:
        """Run `script` as one job over all nodes, on the CPU with gloo; returns each node's output.

        environment: variables beside this process's; timeout: seconds for the whole job; show:
        node 0 writes to this process's output and error, and its output is returned empty.
        Node i has the ranks from i * ranks_per_node. All processes in the nodes are killed when the
        job ends. Raises JobError if a node fails or the time is over.
        """
        logs = [Path(self.directory, f"{name}.log") for name in self.names]
        for log in logs:
            log.write_bytes(b"")
        outputs = [None if show and log == logs[0] else log for log in logs]
        command = [str(script), *map(str, arguments)]
        job = Job(self, command, outputs, environment or {}, timeout, ranks_per_node)
        try:
            job.wait()
            statuses = job.statuses
        finally:
            job.kill()
        texts = [log.read_text(errors="replace") for log in logs]
        _require_success(Path(script).name, statuses, texts, timeout)
        return texts


class Job:
    """A script under torchrun on all nodes of a network, with the parameters of Network.torchrun.

    What a node writes is added to its one of `outputs`; None is this process's output and error.
    """

    def __init__(
        self,
        network: Network,
        command: list[str],
        outputs: Sequence[Path | None],
        environment: dict[str, str],
        timeout: float = math.inf,
        ranks_per_node: int = 1,
    ):
        self._network, self._agents = network, []
        self._end = time.monotonic() + timeout
        own = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "TMPDIR": network.directory}
        own["CUDA_VISIBLE_DEVICES"] = ""  # NCCL refuses nodes that share a GPU
        settings = {"env": os.environ | own | environment, "stdin": subprocess.DEVNULL}
        settings["start_new_session"] = True  # Ctrl-C is for this process, which then cleans up
        for node, output in enumerate(outputs):
            agent = [*_agent(network, node, ranks_per_node), *command]
            with open(output or os.devnull, "a") as file:
                places = {"stdout": file, "stderr": file} if output else {}
                self._agents.append(subprocess.Popen(agent, **settings, **places))

    @property
    def statuses(self) -> list[int | None]:
        return [agent.poll() for agent in self._agents]

    @property
    def running(self) -> bool:
        """Whether nodes have not ended, none has failed a while ago, and the time is not over."""
        statuses = self.statuses
        if any(statuses):
            self._end = min(self._end, time.monotonic() + SECONDS_TO_FAIL_TOO)
        return None in statuses and time.monotonic() < self._end

    def wait(self, seconds: float = math.inf, until: Callable = lambda: False) -> bool:
        """Until the job has ended, the time is over or `until()`; returns whether it still runs."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end and not until():
            time.sleep(0.02)
        return self.running

    def workers(self, node: int) -> list[int]:
        """The processes on a node that run the script."""
        return children(self._agents[node].pid)

    def send(self, node: int, number: signal.Signals) -> bool:
        """A signal for the workers of a node; returns whether one was there."""
        return send(self.workers(node), number)

    def kill(self) -> None:
        """End all processes of the nodes, as a loss of power does."""
        _kill_processes(self._network.names)
        for agent in self._agents:
            agent.wait()


def _agent(network: Network, node: int, ranks_per_node: int) -> list[str]:
    return [
        *("ip", "netns", "exec", network.names[node]),
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={len(network.names)}", f"--nproc_per_node={ranks_per_node}"),
        *("--rdzv_backend=c10d", f"--rdzv_endpoint={network.addresses[0]}:{PORT}", "--rdzv_id=0"),
        # All nodes have this machine's host name: say who hosts, and under which address.
        *(f"--rdzv_conf=is_host={int(node == 0)}", f"--local_addr={network.addresses[node]}"),
    ]


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


def output_of(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {' '.join(result.stderr.split())}")
    return result.stdout


def _ip(command: str) -> str:
    return output_of("ip", *command.split())


def send(processes: Iterable[int], number: signal.Signals) -> bool:
    """A signal for processes; returns whether one was there."""
    there = False
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
            there = True
    return there


def children(pid: int) -> list[int]:
    """The processes that a process has started; none where it is gone."""
    with suppress(OSError):
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _processes(*namespaces: str) -> list[int]:
    return [int(pid) for name in namespaces for pid in _ip(f"netns pids {name}").split()]


def _kill_processes(namespaces: Iterable[str]) -> None:
    deadline = time.monotonic() + SECONDS_TO_END
    while processes := _processes(*namespaces):
        if time.monotonic() > deadline:
            left = " ".join(map(str, processes))
            raise RuntimeError(f"killed processes have not ended in {SECONDS_TO_END} s: {left}")
        send(processes, signal.SIGKILL)
        time.sleep(0.01)


def _require_success(
    script: str, statuses: list[int | None], outputs: list[str], timeout: float
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
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="ARG", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    try:
        if missing := requirements_missing():
            raise RuntimeError(missing)
        if not Path(options.script).is_file():
            raise ValueError(f"{options.script} is not a file: give a Python script")
        with Network(options.nodes, options.rate, options.delay) as network:
            network.torchrun(options.script, *options.arguments, show=True)
    except (ValueError, RuntimeError) as error:
        print(f"netns.py: {error}", file=sys.stderr)
        return error.status if isinstance(error, JobError) else 1
    except KeyboardInterrupt:
        return 128 + int(signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
