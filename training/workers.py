"""The processes of a launch: how they meet, agree, fail and end together."""

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ef21_muon.transport.reach import INTERFACE, Place, cut_off
from training.console import lenient_output

MEMORY = "the memory does not suffice: give a smaller model or batch.micro_size"
# What errors of torch mean, by a part of their message.
MEANINGS = {
    "EADDRINUSE": "the port is taken: give a free --master-port, and start rank 0 once",
    "Unable to find address": "no such network interface: set GLOO_SOCKET_IFNAME to one that is up",
    "no socket interface": "no such network interface: set NCCL_SOCKET_IFNAME to one that is up",
    **dict.fromkeys(("allocate memory", "out of memory", "size calculation overflowed"), MEMORY),
}
TRANSPORTS = ("device", "host")
FINAL = os.EX_CONFIG  # the exit status after an error that no restart can fix


class RunError(Exception):
    """A run cannot start or continue. One line: what was given, what is allowed, what to do."""


class FinalError(RunError):
    """A RunError that no restart can fix."""


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def by_host_alone(devices: set[bytes]) -> bool:
    """Whether messages cannot go from device to device: ranks share a GPU, or only some have one.

    devices: the kinds of device that the ranks on all machines have.
    """
    return b"shared" in devices or len(devices) > 1


# Kept until the process ends, since threads of gloo may still use their groups.
_ended: list["Workers"] = []


def exit_process(status: int) -> NoReturn:
    """End the process without the interpreter's teardown.

    During a teardown, threads of gloo may still release tensors, which needs the interpreter. The
    process would be aborted ("terminate called without an active exception") after all its work.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it is closed, or there is none
            stream.flush()
    os._exit(status)


class Workers:
    """This process among those that torchrun started; the only one without torchrun, or if `alone`.

    `rank` is its number, `count` the number of processes, and `device` where it computes: with
    NCCL on CUDA if each has a GPU of its own; else with gloo, on GPUs that they share or on the
    CPU. They meet in `run`. Waiting longer than `timeout` seconds for another process is an error.
    """

    # Set by torchrun.
    ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

    # How long workers have to report that they are alive, after one has waited in vain for another;
    # less than `timeout`.
    REPORT_SECONDS = 10
    ENDING_SECONDS = 2  # the same, once torchrun ends them

    def __init__(self, timeout: float = 600, alone: bool = False):
        self._environment = {} if alone else os.environ
        self.rank, self.count, local_rank, local_count = (
            int(text) if (text := self._environment.get(name, "")).isdecimal() else default
            for name, default in zip(self.ENVIRONMENT, (0, 1, 0, 1), strict=True)
        )
        self.device, self.shared = torch.device("cpu"), False
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            self.device = torch.device("cuda", local_rank % gpus)
            self.shared = max(local_rank + 1, local_count) > gpus
        self.control = self._from_host = self._store = None
        self.meshes: dict[tuple, DeviceMesh] = {}  # for workers of several ranks
        self.asked_to_stop = False
        self.training = False  # stays True after the training
        self.timeout = timedelta(seconds=timeout)

    def _use_device(self) -> None:
        """Use the device. Raises ValueError if torchrun's variables contradict each other."""
        for name in (*self.ENVIRONMENT, "MASTER_PORT"):
            if not (text := self._environment.get(name, "0")).isdecimal():
                raise ValueError(f"{name}={text} is not a whole number: launch with torchrun")
        if self.rank >= self.count or (self.count > 1 and "RANK" not in self._environment):
            given = self._environment.get("RANK", "")
            raise ValueError(
                f"RANK={given} does not go with WORLD_SIZE={self.count}: launch with torchrun, or "
                "unset both"
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _meet(self) -> None:
        store, _, _ = next(dist.rendezvous("env://", timeout=self.timeout))
        self._store = dist.PrefixStore(self._agree_on_name(store), store)
        self._store.set(f"device/{self.rank}", "shared" if self.shared else self.device.type)
        of_ranks = {self._store.get(f"device/{rank}") for rank in range(self.count)}
        self.shared = by_host_alone(of_ranks)
        self._require_reach(Place.here())
        apart = self.device.type == "cuda" and not self.shared
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if apart else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.count,
            timeout=self.timeout,
        )
        # For collectives on the CPU, at the same time as the training's own.
        self.control = dist.new_group(backend="gloo", timeout=self.timeout)
        if apart:
            self._from_host = dist.new_group(backend="gloo", timeout=self.timeout)

    def _require_reach(self, here: Place) -> None:
        """Raise FinalError if gloo would listen at an address that other machines cannot reach.

        Without this check gloo would try until `timeout`, and not say why it failed.
        """
        self._store.set(f"place/{self.rank}", json.dumps(asdict(here)))
        texts = [self._store.get(f"place/{rank}") for rank in range(self.count)]
        places = [Place(**json.loads(text)) for text in texts]
        self._store.set(f"seen/{self.rank}", "")
        if behind := cut_off(places):
            place = places[behind[0]]
            if self.first:  # it holds the store, which the others still read
                seen = [f"seen/{rank}" for rank in range(self.count)]
                with suppress(dist.DistError):
                    self._store.wait(seen, timedelta(seconds=self.REPORT_SECONDS))
            raise FinalError(
                f"rank {behind[0]} is on a machine whose name, {place.host}, is {place.address} "
                f"there, which is no address for other machines: set {INTERFACE} on every node to "
                "the network interface by which they reach each other (ip addr lists them)"
            )

    def _agree_on_name(self, store: dist.Store) -> str:
        """Agree on a prefix for the store that no earlier start of workers has used.

        After a restart torchrun's store still holds what the ended processes wrote, and nodes may
        disagree on the number of restarts (https://github.com/pytorch/pytorch/issues/135712). So
        every process draws a random number. The name consists of all numbers, and is valid once all
        processes have confirmed it: no process confirms a name with a number that it did not draw.
        Raises ValueError if another process has the same rank.
        """
        ranks = [str(rank) for rank in range(self.count)]
        number = secrets.token_hex(8)
        store.set(str(self.rank), number)
        until = time.monotonic() + self.timeout.total_seconds()
        while True:
            drawn = {rank: store.get(rank).decode() for rank in ranks if store.check([rank])}
            if drawn[str(self.rank)] != number:
                raise ValueError("this rank was started twice: start every rank once")
            name = " ".join(drawn.values())
            confirmed = dist.PrefixStore(name, store)
            confirmed.set(str(self.rank), "")
            missing = [rank for rank in ranks if not confirmed.check([rank])]
            if not missing:
                return name
            if time.monotonic() > until:
                raise TimeoutError(
                    f"rank {', '.join(missing)} did not start within "
                    f"{self.timeout.total_seconds():g} s: see that process or its node, or give a "
                    "longer --timeout"
                )
            time.sleep(0.05)

    @contextmanager
    def stoppable(self):
        """Inside it, SIGTERM, SIGINT and SIGHUP only request a stop, also after an error.

        When a worker is lost, torchrun ends the others, which still have to report it. Under nohup
        SIGHUP is ignored, and stays so.
        """
        self.training = True
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = [signal.signal(number, self._request_stop) for number in numbers]
        yield
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    def _request_stop(self, number: int, frame: object) -> None:
        self.asked_to_stop = True

    def group(self, transport: str, sync_delay: int = 0) -> dist.ProcessGroup | None:
        """The process group that carries messages; None is the default group.

        Args:
            transport: "device" or "host", the memory that messages are sent from.
            sync_delay: the steps that messages travel.

        Raises:
            RunError: for messages from a device that workers share, and for NCCL with a delay,
                since its kernels would block the computation.
        """
        if transport == "device" and self.shared:
            raise RunError(
                "transport=device needs a GPU for each rank, and this machine, or another, has "
                f"fewer (here {torch.cuda.device_count()}): start as many, or give transport=host"
            )
        by_nccl = transport == "device" and self._from_host is not None
        if by_nccl and sync_delay:
            raise RunError(
                f"optimizer.sync_delay={sync_delay} is not allowed with NCCL, whose receiving "
                "kernel would spin on the GPU all the while: give transport=host, or "
                "optimizer.sync_delay=0"
            )
        return self._from_host if transport == "host" else None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes."""
        return self.rank == 0

    def say(self, text: str = "", error: bool = False) -> None:
        """Print on rank 0."""
        if self.first:
            print(text, file=sys.stderr if error else sys.stdout, flush=True)

    def together(self, action: Callable):
        """Call `action` on every worker and return its result, or fail on all of them.

        If any worker raises an expected error (RunError, ValueError, OSError, ArithmeticError), all
        raise it as one RunError, so that no worker waits for one that has stopped.
        """
        result, problem = None, None
        try:
            result = action()
        except (RunError, ValueError, OSError, ArithmeticError) as error:
            problem = one_line(error)
        problems = self.gather(problem)
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if failed:
            prefix = "" if len(failed) == self.count else f"rank {failed[0]}: "
            raise RunError(prefix + problems[failed[0]])
        return result

    def gather(self, value) -> list:
        """The value of every worker, on all of them."""
        if self.control is None:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value):
        """Rank 0's value, on all workers."""
        return self.gather(value if self.first else None)[0]

    def start_sum(self, *numbers: float | torch.Tensor) -> Callable[[], list[float]]:
        """Start to add up the numbers over all workers, in float64.

        Returns a function that waits for the sums. The training's own collectives continue
        meanwhile.
        """
        sums = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        if self.control is None:
            return sums.tolist
        work = dist.all_reduce(sums, group=self.control, async_op=True)

        def wait() -> list[float]:
            work.wait()
            return sums.tolist()

        return wait

    def sum(self, *numbers: float | torch.Tensor) -> list[float]:
        """The sums of the numbers over all workers, in float64."""
        return self.start_sum(*numbers)()

    def run(self, work: Callable[[], int]) -> int:
        """Meet the other workers and do the work of this process; return its exit status.

        An expected error prints one line and has status 1. Rank 0 prints a RunError, which all
        workers raise. A worker prints any other error itself, and torchrun then ends all workers.
        If other workers were lost, the line says which. The status of a FinalError is FINAL.
        """
        with lenient_output():
            return self._run(work)

    def _run(self, work: Callable[[], int]) -> int:
        status = 1
        try:
            self._use_device()
            if "RANK" in self._environment:
                self._meet()
            status = work()
        except RunError as error:
            self.say(f"error: {error}", error=True)
            status = FINAL if isinstance(error, FinalError) else 1
        except (ValueError, OSError) as error:
            print(f"error: rank {self.rank}: {one_line(error)}", file=sys.stderr)
            return status
        except RuntimeError as error:
            meaning = self._meaning(error)
            if not meaning:
                raise
            print(f"error: rank {self.rank}: {meaning} ({one_line(error)})", file=sys.stderr)
            return status
        if dist.is_initialized():
            if status:  # torchrun ends the others when one has failed: rank 0 has to print first
                with suppress(RuntimeError):
                    self.gather(None)
            dist.destroy_process_group()
            _ended.append(self)
        return status

    def _meaning(self, error: RuntimeError) -> str | None:
        """What has happened and what to do, or None if that is not known."""
        for part, meaning in MEANINGS.items():
            if part in str(error):
                return meaning
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return None  # gloo's errors have no type of their own
        if self._store is None:
            return (
                f"no meeting at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: start all "
                f"{self.count} ranks, where they reach this address, or give a longer --timeout"
            )
        lost = ", ".join(map(str, self._lost()))
        if "connectFullMesh" in str(error):  # at the start
            return (
                f"no connection to {f'rank {lost}' if lost else 'other ranks'}: see that process "
                f"or its node, and if it runs, set {INTERFACE} on every node to the network "
                "interface by which they reach each other"
            )
        return lost and (
            f"lost rank {lost}: see that process or its node, and resume with resume=auto"
        )

    def _lost(self) -> list[int]:
        """The ranks that do not report that they are alive, after this one has met an error.

        Rank 0, whose node has the store, if the store does not answer.
        """
        lost, since = [0], time.monotonic()

        def patience() -> float:
            longest = self.ENDING_SECONDS if self.asked_to_stop else self.REPORT_SECONDS
            return min(longest, self.timeout.total_seconds()) - (time.monotonic() - since)

        def ask() -> None:
            nonlocal lost
            present = dist.PrefixStore("present", self._store)
            ranks = range(self.count)
            with suppress(dist.DistError):
                present.set(str(self.rank), "")
                while lost := [rank for rank in ranks if not present.check([str(rank)])]:
                    if patience() <= 0:
                        return
                    time.sleep(0.1)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        while asking.is_alive() and patience() > 0:
            asking.join(0.1)
        return lost
