"""Launches of processes that have imported torch and train.py already.

To import them takes longer than all else that most launches do, in every process of each. So a
server imports them once, and every process that is asked for is a fork of it; torchrun's agents,
which are torch's own, fork their workers likewise, before they have threads. From there on a
process is as if it had been started: arguments, environment, folder, output, signals and exit
status; but compositions are remembered, and runs draw no pictures (shortcuts.py). With FRESH=1 in
the environment, and where there is a GPU, all are started instead. Scripts that start processes
themselves start forks where `popen` stands in for subprocess.Popen: workers of
scripts/supervise.py, and agents in network namespaces of scripts/netns.py.
"""

import atexit
import ctypes
import gc
import io
import json
import math
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run"]
PER_NODE = ("--nproc_per_node=", "--nproc-per-node=")
SUPERVISE = str(ROOT / "scripts" / "supervise.py")
IN_NAMESPACE = ["ip", "netns", "exec"]
PREPARED: list[tuple[int, socket.socket]] = []  # processes that wait for what they shall become
ORIGINAL, TEMPORARY = subprocess.Popen, tempfile.gettempdir()
CLONE_NEWNET, CLONE_NEWNS, MS_SLAVE_REC, MNT_DETACH = 0x40000000, 0x20000, 0x84000, 2


def start(arguments: list[str], fresh: bool = False, **options) -> "subprocess.Popen | Process":
    """`python ARGUMENT ...`, a script or torchrun; options: cwd, env, and stdout, stderr, as files.

    What subprocess.Popen returns, or what has of it all that is used.
    """
    if fresh or not forking():
        return ORIGINAL([sys.executable, *arguments], **options)
    return Process(arguments, **options)


def forking() -> bool:
    return os.environ.get("FRESH") != "1" and not torch.cuda.is_available()


def popen(command, stdout=None, stderr=None, env=None, cwd=None, **options):
    """In place of subprocess.Popen: a fork for Python whose output goes to a file."""
    namespace, rest = None, [*map(str, command)]
    if rest[:3] == IN_NAMESPACE:
        namespace, *rest = rest[3:]
    can_fork = rest[0] == sys.executable and (rest[1:3] == TORCHRUN or rest[1][0] != "-")
    if can_fork and hasattr(stdout, "fileno") and forking():
        place = cwd or Path.cwd()
        return Process(rest[1:], place, env or dict(os.environ), stdout, stderr, namespace)
    return ORIGINAL(command, stdout=stdout, stderr=stderr, env=env, cwd=cwd, **options)


class Process:
    """A fork of the server, with what subprocess.Popen has."""

    def __init__(
        self,
        arguments: list[str],
        cwd: Path,
        env: dict[str, str],
        stdout,
        stderr,
        namespace: str | None = None,
    ):
        self.args, self.returncode = arguments, None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        request = json.dumps([arguments, str(cwd), env, namespace]).encode()
        outputs = [stdout.fileno(), stderr.fileno()]
        socket.send_fds(self._connection, [len(request).to_bytes(8, "big")], outputs)
        self._connection.sendall(request)
        self.pid = self._told()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = self._told()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def terminate(self) -> None:
        self._kill(signal.SIGTERM)

    def kill(self) -> None:
        self._kill(signal.SIGKILL)

    def _kill(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def _told(self) -> int:
        return int.from_bytes(_exactly(self._connection, 8), "big", signed=True)


@cache
def _server() -> str:
    """Where the server of this process listens; it ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="preloaded-", dir=TEMPORARY)
    path = f"{folder.name}/socket"
    # One thread, also of what numpy multiplies with: a fork has no others.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    process = ORIGINAL(
        [sys.executable, __file__, path],
        cwd=ROOT,
        env=os.environ | threads | {"PYTHONPATH": str(ROOT), "TMPDIR": TEMPORARY},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"

    def end() -> None:
        process.stdin.close()
        process.wait()
        folder.cleanup()

    atexit.register(end)
    return path


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("the server of launches has ended")
        data += piece
    return data


def serve(path: str) -> None:
    """Fork what is asked for at the socket, until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, reap)
    global LIBRARIES
    LIBRARIES = sys.path[2:]  # behind this folder and PYTHONPATH
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg  # noqa: F401
    import torch._dynamo  # as every optimizer does
    import torch.distributed.fsdp
    import torch.distributed.run  # noqa: F401
    from shortcuts import take_shortcuts

    import train  # noqa: F401
    from training import config

    take_shortcuts()
    config._composed([])
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has the thread alone that forks"
    gc.freeze()  # of what is imported no fork searches, or copies, anything
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        size, outputs, _, _ = socket.recv_fds(connection, 8, 2)
        request = json.loads(_exactly(connection, int.from_bytes(size, "big")))
        compose_once(request[0])
        if os.fork() == 0:
            listener.close()
            keep(connection, outputs, *request)
        connection.close()
        for number in outputs:
            os.close(number)


def compose_once(arguments: list[str]) -> None:
    """Remember what a launch will compose, so that none of its ranks composes it again."""
    from training import config

    overrides = [one for one in arguments if "=" in one and one[0] != "-"]
    if overrides:
        with suppress(Exception):  # which the launch meets, too, and reports
            config._composed(overrides)
            gc.freeze()


def reap(*_: object) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def keep(
    connection: socket.socket,
    outputs: list[int],
    arguments: list[str],
    folder: str,
    environment: dict,
    namespace: str | None,
) -> NoReturn:
    """Fork the process that is asked for, and report its start and its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        connection.detach()  # which is closed with all files
        if namespace:
            enter(namespace)
        become(arguments, environment, folder, outputs)
    for number in outputs:
        os.close(number)
    connection.sendall(pid.to_bytes(8, "big"))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        connection.sendall(code.to_bytes(8, "big", signed=True))
    finally:
        os._exit(0)


def enter(namespace: str) -> None:
    """Do what `ip netns exec` does: the network, and its interfaces in /sys."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        done = (
            *(libc.setns(file.fileno(), CLONE_NEWNET), libc.unshare(CLONE_NEWNS)),
            libc.mount(b"", b"/", b"none", ctypes.c_ulong(MS_SLAVE_REC), None),
            libc.umount2(b"/sys", MNT_DETACH),
            libc.mount(namespace.encode(), b"/sys", b"sysfs", ctypes.c_ulong(0), None),
        )
    assert not any(done), (done, os.strerror(ctypes.get_errno()))


def become(arguments: list[str], environment: dict, folder: str, outputs: list[int]) -> NoReturn:
    """Do what a new interpreter does with them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
    first = folder if arguments[:2] == TORCHRUN else os.path.dirname(arguments[0])
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [os.path.abspath(first), *filter(None, paths), *LIBRARIES]
    sys.argv[:] = arguments
    status = 0
    try:
        if arguments[:2] == TORCHRUN:
            torchrun(arguments[1:])
        else:
            supervises = arguments[0] == SUPERVISE
            subprocess.Popen = as_supervised if supervises else ORIGINAL
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.last_value = error
        traceback.print_exc()
        status = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def torchrun(arguments: list[str]) -> None:
    """torch's own, but for workers, which are forks of it."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda handler, command, environment: Worker(command, environment)
    sys.argv[:] = arguments
    for count in (one.partition("=")[2] for one in arguments if one.startswith(PER_NODE)):
        for _ in range(int(count)):
            prepare()
    run.main()


def prepare() -> None:
    """Fork a process that waits for what it shall become, while this one has a single thread.

    A lock that another thread holds at a fork would be locked in it for ever.
    """
    mine, its = socket.socketpair()
    pid = os.fork()
    if pid:
        its.close()
        PREPARED.append((pid, mine))
        return
    mine.close()
    for _, other in PREPARED:
        other.close()
    if request := its.makefile().read():
        lead(*json.loads(request))
    os._exit(0)


def lead(arguments: list[str], environment: dict, folder: str) -> NoReturn:
    """Become a worker, with a session of its own."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    become(arguments, environment, folder, [1, 2])


def as_supervised(command: list[str], env: dict[str, str], **_) -> "Worker":
    """In place of subprocess.Popen, for ranks of scripts/supervise.py."""
    return Worker(command, env)


class Worker:
    """A fork of this process, prepared if there is any; it has what its users use of Popen.

    They are torchrun and scripts/supervise.py.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        python, unbuffered, *arguments = command
        assert (python, unbuffered) == (sys.executable, "-u"), command
        self.args, self.returncode = command, None
        request = arguments, dict(environment), os.getcwd()
        if PREPARED:
            self.pid, connection = PREPARED.pop(0)
            with connection:
                connection.sendall(json.dumps(request).encode())
        elif not (pid := os.fork()):
            lead(*request)
        else:
            self.pid = pid

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1])
