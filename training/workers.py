"""The processes of a launch: who am I, and how do we agree."""

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
# What errors that torch raises mean, by a part of their message.
MEANINGS = {
    "EADDRINUSE": "the port is taken: give a free --master-port, and start rank 0 once",
    "Unable to find address": "no such network interface: set GLOO_SOCKET_IFNAME to one that is up",
    "no socket interface": "no such network interface: set NCCL_SOCKET_IFNAME to one that is up",
    **dict.fromkeys(("allocate memory", "out of memory", "size calculation overflowed"), MEMORY),
}
TRANSPORTS = ("device", "host")
FINAL = os.EX_CONFIG  # the exit status after an error that no restart can mend


class RunError(Exception):
    """A run cannot start or go on. One line: what was given, what is allowed, what to do."""


class FinalError(RunError):
    """A RunError that no restart can mend."""


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def by_host_alone(devices: set[bytes]) -> bool:
    """Whether messages cannot go from device to device, of all ranks' devices on all machines.

    So it is where ranks share a GPU, and where only some have one.
    """
    return b"shared" in devices or len(devices) > 1


# Not let go of before the process ends, since threads of gloo may still use their groups.
_ended: list["Workers"] = []


def leave(status: int) -> NoReturn:
    """End the process, without the interpreter's teardown.

    Threads of gloo may still let go of tensors then, which needs the interpreter and aborts the
    process ("terminate called without an active exception") after all its work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or none at all
            stream.flush()
    os._exit(status)


class Workers:
    """This process among the workers that torchrun started; alone without torchrun, or if told so.

    `rank`, `count`, `device`: CUDA with NCCL where there is a GPU for each, else the CPU, or GPUs
    that they share, with gloo. They meet in `finish`. To wait more than `timeout` seconds for
    another worker is an error.
    """

    # By which torchrun says it.
    ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

    # For workers to say that they are there, once one of them waited in vain; less than `timeout`.
    REPORT_SECONDS = 10
    ENDING_SECONDS = 2  # for the same, once torchrun ends them

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
        self.meshes: dict[tuple, DeviceMesh] = {}  # of workers of several ranks
        self.asked_to_stop = False
        self.training = False  # or has trained
        self.timeout = timedelta(seconds=timeout)

    def _take_place(self) -> None:
        """Use the device. Raises ValueError for an environment that makes no sense."""
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
        # On the CPU, and beside the training's own collectives.
        self.control = dist.new_group(backend="gloo", timeout=self.timeout)
        if apart:
            self._from_host = dist.new_group(backend="gloo", timeout=self.timeout)

    def _require_reach(self, here: Place) -> None:
        """Raise FinalError where gloo would listen at an address that other machines do not reach.

        For it would try for as long as `timeout`, and not say why.
        """
        self._store.set(f"place/{self.rank}", json.dumps(asdict(here)))
        texts = [self._store.get(f"place/{rank}") for rank in range(self.count)]
        places = [Place(**json.loads(text)) for text in texts]
        self._store.set(f"seen/{self.rank}", "")
        if behind := cut_off(places):
            place = places[behind[0]]
            if self.first:  # the store goes with it, in which others still look
                seen = [f"seen/{rank}" for rank in range(self.count)]
                with suppress(dist.DistError):
                    self._store.wait(seen, timedelta(seconds=self.REPORT_SECONDS))
            raise FinalError(
                f"rank {behind[0]} is on a machine whose name, {place.host}, is {place.address} "
                f"there, which is no address for other machines: set {INTERFACE} on every node to "
                "the network interface by which they reach each other (ip addr lists them)"
            )

    def _agree_on_name(self, store: dist.Store) -> str:
        """A name for what these processes store, which no earlier start of workers has used.

        After a restart torchrun's store still holds what the ended processes left, and nodes need
        not agree on the number of restarts (https://github.com/pytorch/pytorch/issues/135712). So
        every process draws a number of its own, and a name made of all numbers holds as soon as all
        have confirmed it: none confirms one with the number that an ended process drew for it.
        Raises ValueError if another process took this one's place.
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
        """In it, SIGTERM, SIGINT and SIGHUP do nothing but request a stop; nor after an error.

        For when a worker is lost, torchrun ends the others, who have yet to say so. Under nohup
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

    def group(self, exchange: str, delay: int = 0) -> dist.ProcessGroup | None:
        """The process group of messages that go from `exchange`, "device" or "host"; None is all.

        delay: steps that they travel. Raises RunError for messages from the device where workers
        share one, and for NCCL with a delay, in which its kernels would hold up the computation.
        """
        if exchange == "device" and self.shared:
            raise RunError(
                "transport=device needs a GPU for each rank, and this machine, or another, has fewer"
                f" (here {torch.cuda.device_count()}): start as many, or give transport=host"
            )
        by_nccl = exchange == "device" and self._from_host is not None
        if by_nccl and delay:
            raise RunError(
                f"optimizer.sync_delay={delay} is not allowed with NCCL, whose receiving kernel would "
                "spin on the GPU all the while: give transport=host, or optimizer.sync_delay=0"
            )
        return self._from_host if exchange == "host" else None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    def say(self, text: str = "", error: bool = False) -> None:
        """Print on rank 0."""
        if self.first:
            print(text, file=sys.stderr if error else sys.stdout, flush=True)

    def together(self, action: Callable):
        """Call `action` on every worker and return its result, or fail on all of them.

        An expected error (RunError, ValueError, OSError, ArithmeticError) of any worker becomes one
        RunError that all raise, so that no worker waits for one that has stopped.
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

    def start_total(self, *numbers: float | torch.Tensor) -> Callable[[], list[float]]:
        """Start to sum up the numbers over all workers, in float64; returns a function that waits.

        Beside the training's own collectives, which do not hold it up.
        """
        sums = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        if self.control is None:
            return sums.tolist
        work = dist.all_reduce(sums, group=self.control, async_op=True)

        def wait() -> list[float]:
            work.wait()
            return sums.tolist()

        return wait

    def total(self, *numbers: float | torch.Tensor) -> list[float]:
        """The sums of the numbers over all workers, in float64."""
        return self.start_total(*numbers)()

    def finish(self, work: Callable[[], int]) -> int:
        """Meet the other workers, do the work of this process; returns the exit status.

        An expected error is one line and status 1: a RunError, which all workers raise, on rank 0;
        another of this worker alone on this worker, whose end torchrun takes for the end of all. If
        other workers were lost, the line says which. The status of a FinalError is FINAL.
        """
        with lenient_output():
            return self._finish(work)

    def _finish(self, work: Callable[[], int]) -> int:
        status = 1
        try:
            self._take_place()
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
            if status:  # torchrun ends the others when one has failed: rank 0 has told by then
                with suppress(RuntimeError):
                    self.gather(None)
            dist.destroy_process_group()
            _ended.append(self)
        return status

    def _meaning(self, error: RuntimeError) -> str | None:
        """What has happened and what to do, None if that is not known."""
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
            f"lost rank {lost}: see that process or its node, and go on with resume=auto"
        )

    def _lost(self) -> list[int]:
        """The ranks that do not say that they are there, when this one has met an error.

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
