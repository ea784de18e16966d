"""Workers that come and go, as threads of one process, and their lighthouse."""

import os
import sys
import threading
from contextlib import contextmanager, suppress
from urllib.request import ProxyHandler, build_opener

os.environ.setdefault("RUST_LOG", "error")

import torch
from preloaded import start
from run import PATHS, ROOT, SUPPORT
from torch import nn
from torchft.coordination import LighthouseServer
from torchft.manager import REPLICA_ID_KEY
from waiting import wait_until

from ef21_muon import LocalSteps
from ef21_muon.fleet import Fleet

HEARTBEAT_MS = 2500
DATA = 4  # inputs, of which a function is learnt


@contextmanager
def lighthouse(least: int, port: int = 0):
    """Its address."""
    server = LighthouseServer(
        bind=f"[::]:{port}",
        min_replicas=least,
        join_timeout_ms=600_000,
        quorum_tick_ms=10,
        heartbeat_timeout_ms=HEARTBEAT_MS,
    )
    try:
        yield f"http://localhost:{server.address().rpartition(':')[2]}"
    finally:
        server.shutdown()


class LighthouseProcess:
    """One that can end and start again, which one in this process cannot."""

    def __init__(self, least: int, port: int):
        script = str(SUPPORT / "workers" / "lighthouse.py")
        env = os.environ | {"PYTHONPATH": PATHS}
        outputs = {"stdout": sys.__stdout__, "stderr": sys.__stderr__}
        self.process = start([script, str(least), str(port)], cwd=ROOT, env=env, **outputs)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def new_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(DATA, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def batch(worker: int, step: int) -> torch.Tensor:
    return torch.randn(8, DATA, generator=torch.Generator().manual_seed(1000 * worker + step))


def gradient(model: nn.Module, worker: int, step: int) -> None:
    """Of this worker's batch of a step, into the parameters."""
    inputs = batch(worker, step)
    model.zero_grad()
    model(inputs).sub(inputs[:, :2].sin()).square().mean().backward()


def parameters_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Worker:
    """A worker's model, fleet and optimizer; `train` in a thread of its own."""

    def __init__(self, number: int, url: str, lr: float = 0.1, **options):
        self.number, self.model = number, new_model()
        inner = torch.optim.SGD(self.model.named_parameters(), lr=lr)
        given = {"patience": options.pop("patience", 60), "run": options.pop("run", None)}
        self.fleet = Fleet(number, url, **given)
        options = {"sync_every": 3, "seed": number, **options}
        self.optimizer = LocalSteps(inner, **options, transport=self.fleet)
        self.global_params: dict[int, torch.Tensor] = {}  # W after every round, by its step
        self.error: Exception | None = None

    def train(self, until: int, joins: bool = True, before_step=lambda worker: None) -> None:
        optimizer = self.optimizer
        if joins:
            self.fleet.join()
        while optimizer.steps < until:
            before_step(self)
            gradient(self.model, self.number, optimizer.steps)
            optimizer.step()
            if optimizer.rounds.of(optimizer.steps)[1] == 0:
                with optimizer.global_params():
                    self.global_params[optimizer.steps] = parameters_of(self.model)

    def start(self, *arguments, **options) -> threading.Thread:
        def run() -> None:
            try:
                self.train(*arguments, **options)
            except Exception as error:
                self.error = error

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread


def who_counted(workers) -> dict[int, tuple[int, ...]]:
    """Of every round the workers whose messages did, as they say themselves."""
    counted: dict[int, list[int]] = {}
    for worker in workers:
        for one in worker.fleet.quorums:
            if one.step is not None and not one.healed:
                round, _, _ = worker.optimizer.rounds.of(one.step - 1)
                counted.setdefault(round, []).append(worker.number)
    return {round: tuple(sorted(numbers)) for round, numbers in counted.items()}


def enter(workers) -> None:
    """So that the lighthouse has heard of all before one of them asks for the others."""
    for worker in workers:
        worker.fleet.members._enter()
    for worker in workers:
        wait_until_heard_of(worker)


def wait_until_heard_of(worker) -> None:
    """By the lighthouse, whose page has all that it hears of."""
    members = worker.fleet.members
    wait_until(lambda: members.manager is not None)
    name = members.manager._store.get(REPLICA_ID_KEY).decode()
    page, direct = f"{members.lighthouse.url}/status", build_opener(ProxyHandler({}))
    wait_until(lambda: f"{name}: seen" in direct.open(page).read().decode())


@contextmanager
def workers(url: str, numbers, **options):
    made = [Worker(number, url, **options) for number in numbers]
    try:
        yield made
    finally:
        for worker in made:
            with suppress(Exception):
                worker.fleet.leave()
