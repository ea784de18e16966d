"""train.py, with faults that happen once: `faults.py FOLDER FAULT[,FAULT ...] ARGUMENT ...`.

FAULT is STEP:PLACE:RANK:DEED: from training step STEP on, or in the checkpoint after it, rank RANK
does DEED when it has called PLACE for the first time. It leaves a file of the fault's name in
FOLDER, with its process id, and no restarted process does it again.

A fault `lose_patience` waits for another rank to be stopped, and lets the run's own --timeout hold
from there on: without it workers wait as long as PATIENCE, however slow the machine is.
"""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from run import PATIENCE
from torch.distributed.checkpoint import FileSystemWriter
from waiting import SleptTime, wait_until

import train
import training.workers
from ef21_muon import EF21Muon
from ef21_muon.transport import fixed
from ef21_muon.transport.fixed import Transport
from training.checkpoint import Checkpoints
from training.gradients import GradientComputation
from training.workers import Workers, exit_process

PLACES = {
    "forward": (GradientComputation, "compute"),
    "encode": (EF21Muon, "_worker_message"),  # of one batch of layers; others are to come
    "exchange": (Transport, "to_servers"),  # one message is on its way; others are to come
    "write": (FileSystemWriter, "write_data"),  # this rank's file of the checkpoint
    "hash": (Checkpoints, "_my_files"),  # all files of the checkpoint are there but the facts
    "publish": (Checkpoints, "_rename"),
}
PAUSE_SECONDS = 1


def end_torchrun() -> None:
    """As a scheduler does; goes on when torchrun has passed it on."""
    passed_on = False

    def note(*arguments) -> None:
        nonlocal passed_on
        passed_on = True
        handler(*arguments)

    handler = signal.signal(signal.SIGTERM, note)
    os.kill(os.getppid(), signal.SIGTERM)
    while not passed_on:
        time.sleep(0.01)


def pause() -> None:
    """Stop for a while, as on a machine that is too busy."""
    me = os.getpid()
    subprocess.Popen(["sh", "-c", f"sleep {PAUSE_SECONDS}; kill -CONT {me}"])
    os.kill(me, signal.SIGSTOP)


DEEDS = {"exit": lambda: os._exit(1), "end_torchrun": end_torchrun, "pause": pause}


class Patience:
    """What workers wait for one another: PATIENCE, and as long as --timeout says after `lose`."""

    def __init__(self):
        meet = Workers._meet

        def meet_patiently(workers: Workers) -> None:
            self.asked_for, workers.timeout = workers.timeout, timedelta(seconds=PATIENCE)
            meet(workers)
            for group in (dist.group.WORLD, workers.control):
                assert group._get_backend(workers.device).options._timeout == workers.timeout
            workers.timeout = self.asked_for

        Workers._meet = meet_patiently

    def lose(self) -> None:
        wait = fixed.wait
        fixed.wait = lambda works: wait(
            [SimpleNamespace(wait=partial(work.wait, self.asked_for)) for work in works]
        )


class Faults:
    """What this process has still to do, by step and place."""

    def __init__(self, folder: Path, faults: str):
        self.folder, self.step, self.todo = folder, 1, []
        self.patience = Patience()
        for fault in faults.split(","):
            step, place, rank, deed = fault.split(":")
            if rank == os.environ.get("RANK", "0") and not (folder / fault).exists():
                self.todo.append((int(step), place, deed, folder / fault))

    def watch(self, place: str) -> None:
        """Do what there is to do after each call of the place."""
        owner, method = PLACES[place]
        original = getattr(owner, method)

        def watched(caller, *args, **kwargs):
            step = self.step_of(caller, args)
            result = original(caller, *args, **kwargs)
            for fault in [one for one in self.todo if one[0] <= step and one[1] == place]:
                self.todo.remove(fault)
                *_, deed, marker = fault
                marker.write_text(str(os.getpid()))
                self.do(deed)
            return result

        setattr(owner, method, watched)

    def step_of(self, caller: object, args: tuple) -> int:
        """That of the training, or of the checkpoint, which may be written in a later one."""
        if isinstance(caller, GradientComputation):
            self.step, self.model = caller.optimizer.steps + 1, caller.raw_model
        if isinstance(caller, FileSystemWriter):
            return int(Path(caller.path).stem.removeprefix("step-"))
        if isinstance(caller, Checkpoints):
            return int(args[0].stem.removeprefix("step-"))
        return self.step

    def do(self, deed: str) -> None:
        """One of DEEDS, or the name of a signal for this process."""
        if deed == "nan":  # in a gradient, after the passes of a step
            self.model.blocks[0].mlp.expand.weight.grad[1, 2] = float("nan")
        elif deed == "lose_patience":
            wait_until(lambda: any(self.folder.glob("*:SIGSTOP")))
            self.patience.lose()
        elif deed in DEEDS:
            DEEDS[deed]()
        else:
            os.kill(os.getpid(), signal.Signals[deed])


def main() -> int:
    training.workers.time = SleptTime()
    faults = Faults(Path(sys.argv[1]), sys.argv[2])
    for place in PLACES:
        faults.watch(place)
    del sys.argv[1:3]
    return train.main()


if __name__ == "__main__":
    exit_process(main())
