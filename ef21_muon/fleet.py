"""Local steps of workers that come and go."""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from ef21_muon.arithmetic import SAFE, WHY, digests
from ef21_muon.exchange.admission import FleetRefused, differing_from
from ef21_muon.exchange.collectives import ALONE, Exchange, Traffic
from ef21_muon.exchange.fleet import Fleet
from ef21_muon.exchange.layers import RoundBatch
from ef21_muon.exchange.meeting import Meeting
from ef21_muon.exchange.phases import Phase
from ef21_muon.exchange.timetable import of_worker
from ef21_muon.fingerprint import fingerprint
from ef21_muon.inner import beginner
from ef21_muon.local_steps import LocalSteps
from ef21_muon.messages.feedback import EF21
from ef21_muon.rules import W2S, starts_of

PAUSE = 2.0  # seconds between meetings for those that are late
FEW = 3  # layers, at most, that a warning names
MEETINGS = 1000  # at most, that are remembered for who asks for them
SHARED = ("model_shift", "server_momentum")  # of the tables of batches
BITS = "bits of "  # before the name of what every worker computes for itself
INSTEAD = f"give all workers {SAFE}, or leave this one out"
APART = 3  # times in a row that a worker comes with another W of the same messages

log = logging.getLogger("ef21_muon")


class FleetSteps(LocalSteps):
    """LocalSteps whose rounds go on with the workers that are there.

    The mean of a round is over the messages that came. A worker that comes anew, was away, or has
    another W takes over what the others share, which is W, the outer momentum V and the step; its
    own state, e_j and that of the inner optimizers, begins anew, and its message of that round,
    which was made from another W, does not count. So no worker goes on with another W than the
    others: `digest` is compared in every round. `told` counts the local steps in W, of all workers.
    A message that is not finite does not count on any worker, and its sender begins anew like that.

    fleet: the others; on every rank of a worker one. run: what else has to be the same on all, as
    the values of a configuration by name. A process group, where there is one, is of this worker's
    own ranks. `join()` comes before the first step. Options are those of LocalSteps,
    but every worker serves all layers and a round is one message, whatever `buckets` says.

    Raises ValueError for what cannot go on without a member or within a round: other placements,
    messages back that lose anything, feedback "ef21" (whose servers remember the mean of all
    workers), `stagger`, `delay`, and compressors that change in the run. `step` and `join` raise
    what Fleet.gather does: FleetRefused where the others are built otherwise or compute other bits
    of the same messages.
    """

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        every: int | Mapping[int, int] = 30,
        *,
        fleet: Fleet,
        run: Mapping[str, object] | None = None,
        w2s: W2S | None = None,
        server: str = "auto",
        buckets: int = 4,
        stagger: bool = False,
        delay: int = 0,
        **options,
    ):
        if server not in ("auto", "replicated"):
            raise ValueError(
                f"server={server!r} is not allowed for workers that come and go: a server would go "
                "with its worker, give replicated"
            )
        given = {"stagger": stagger, "delay": delay}
        if given := [f"{key}={value}" for key, value in given.items() if value]:
            raise ValueError(
                f"{' with '.join(given)} is not allowed for workers that come and go: they meet "
                "in whole rounds, leave it out"
            )
        if w2s is not None and starts_of(w2s) != {0}:
            raise ValueError(
                f"w2s={w2s} is not allowed for workers that come and go: give one compressor for "
                "the whole run"
            )
        if options.get("buffers") is not None:
            raise ValueError(
                "buffers are not averaged over workers that come and go: leave them out, and "
                "normalise without running statistics"
            )
        self.fleet, self.told = fleet, 0
        self._within_step, self._untold = False, 0  # local steps since the last meeting
        self.meetings: deque[Meeting] = deque(maxlen=MEETINGS)
        self._met: tuple[int, ...] = ()  # the workers of the last one
        self._apart = 0  # times in a row that it came with another W
        super().__init__(inner, every, w2s=w2s, server="replicated", buckets=1, **options)
        if self.feedback is EF21:
            raise ValueError(
                "feedback='ef21' is not allowed for workers that come and go: its servers remember "
                "the mean of all workers, give ef14 or none"
            )
        self._begin_inner = [beginner(optimizer) for optimizer in self.inner]
        run = dict(run or {})  # comes first, and holds for names that options have too
        settings = run | self._settings() | run
        self._built = {key: str(value) for key, value in settings.items()}
        computed = digests(self._recomputed(self.rules, self.server))
        self._bits = {f"{BITS}{name}": str(value) for name, value in computed.items()}
        told = hashlib.sha256(repr(sorted((self._built | self._bits).items())).encode()).digest()
        self._digest_of_built = int.from_bytes(told[:7], "big")
        fleet.attach(self)

    @property
    def built(self) -> Mapping[str, str]:
        """What has to be the same on all workers, by name."""
        return self._built

    def _new_generator(self, seed: int, rank: int, purpose: str) -> Generator:
        fleet = self.fleet  # each worker has its own random numbers, as with fixed membership
        return super()._new_generator(seed, fleet.worker * fleet.ranks + rank, purpose)

    def _new_phases(self, *arguments) -> list[Phase]:
        phases = super()._new_phases(*arguments)
        return [replace(one, exchange=FleetExchange(one.exchange, self._meet)) for one in phases]

    @torch.no_grad()
    def join(self) -> None:
        """Meet the others in the round that they are in, and go on from where they are."""
        phase, _ = self.timetable.departing(self.steps)
        (bucket,) = phase.buckets
        empty = torch.zeros(phase.exchange.size, dtype=torch.uint8, device=self._device)
        messages = self._meet(empty, counts=False)
        if messages or self.fleet.healed:
            self._sent[bucket] = lambda: phase.exchange.parts(messages, bucket)
            self._return(phase, bucket)
            self._land(phase, bucket)
            if self.lanes:
                self.lanes.share_parameters()

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        self._within_step, self._untold = True, self._untold + 1
        try:
            with super()._in_step():
                yield
        finally:
            self._within_step = False

    def finish(self) -> None:
        if self._untold:
            super().finish()

    @property
    def done(self) -> int:
        """Steps so far, with the one that is being taken."""
        return self.steps + self._within_step

    @torch.no_grad()
    def see_off(self, workers: int, seconds: float) -> None:
        """After the last step: wait for all `workers` to come to it, at most so many seconds.

        One that was lost in the last round takes over what the others share.
        """
        until = time.monotonic() + seconds
        phase, _ = self.timetable.departing(max(0, self.steps - 1))
        empty = torch.zeros(phase.exchange.size, dtype=torch.uint8, device=self._device)
        while len(self._met) < workers and time.monotonic() < until:
            time.sleep(PAUSE)
            self._meet(empty, counts=False)

    def fleet_state(self) -> dict[str, int]:
        """Beside a state: how far all workers were."""
        return {"told": self.told, **self.fleet.state()}

    def load_fleet_state(self, state: dict[str, int]) -> None:
        """With a state that was loaded, before `join`."""
        counters = dict(state)
        self.told = counters.pop("told")
        self.fleet.load_state(counters)

    def leave(self) -> None:
        """Let the others go on without this worker."""
        self.fleet.leave()

    def _meet(self, message: Tensor, counts: bool = True) -> list[Tensor]:
        self.require_own_parameters("a meeting")
        broken = self._broken()
        if broken and counts:
            log.warning("%s is not finite after step %s", ", ".join(broken[:FEW]), self.done)
        messages, meeting = self.fleet.gather(message, counts, finite=not broken)
        if self.fleet.worker in meeting.refused:
            self.take_shared_state(self.shared_state())
        self._require_same_bits(meeting)
        self._untold = 0
        if messages:
            self.steps = meeting.step - self._within_step
            _, place, _ = self.rounds.of(meeting.step - 1)
            self.told += len(messages) * (place + 1)
        traffic = meeting.traffic
        self.traffic += of_worker([traffic], self.lanes)[0] if self.lanes else traffic
        self.meetings.append(meeting)
        self._met = meeting.workers
        return messages

    def _require_same_bits(self, meeting: Meeting) -> None:
        """Raise FleetRefused where W of the same messages is another again and again.

        Such a worker would heal for ever, and never count.
        """
        self._apart = self._apart + 1 if meeting.apart else 0
        if self._apart == APART:
            self.leave()
            raise FleetRefused(
                f"this worker had another W than the others {APART} times in a row, of the same "
                f"messages: {WHY}, and so it never counts: {INSTEAD}"
            )

    @torch.no_grad()
    def _broken(self) -> list[str]:
        """The layers whose parameters or state are not finite here. Waits for the device."""
        broken = []
        for batch in self.batches:
            sizes = [torch.stack(torch._foreach_norm(batch.params, float("inf")))]
            sizes += [
                torch.linalg.vector_norm(table, float("inf"), dim=(1, 2))
                for _, table, _ in batch.tables()
            ]
            finite = torch.stack([one.float() for one in sizes]).isfinite().all(0)
            broken += [
                name for name, so in zip(batch.names, finite.tolist(), strict=True) if not so
            ]
        return broken

    @torch.no_grad()
    def squared_length(self, message: Tensor) -> float:
        """Of what a worker's message says. Waits for the device."""
        (phase,) = self.phases
        (bucket,) = phase.buckets
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for b, (rows,) in zip(bucket, phase.exchange.parts([message], bucket), strict=True):
            received = phase.w2s[b].decode(rows, *self.batches[b].shape)
            total += torch.linalg.vector_norm(received, dtype=torch.float64).square()
        return total.item()

    def check_finite(self) -> None:
        """Nothing: a worker whose message is not finite begins anew with the next round."""

    def _receive(self, batch: RoundBatch, from_workers: tuple[Tensor, ...]) -> None:
        if from_workers:
            super()._receive(batch, from_workers)

    def _server_message(self, batch: RoundBatch) -> Tensor:
        if batch.outer_gradient is None:  # no message counts: W stays, and V
            return batch.s2w.encode(batch.zeros(batch.owned), self.generators["s2w"])
        return super()._server_message(batch)

    def _is_its_inner(self, batch: RoundBatch) -> bool:
        return False

    @property
    def _device(self) -> torch.device:
        return self.batches[0].broken_at.device

    def _shared(self) -> list[Tensor]:
        self.require_own_parameters("what workers share")
        tables = (one for batch in self.batches for one in batch.tables())
        return [table for name, table, _ in tables if name in SHARED]

    def digest(self) -> int:
        """Of all that workers share, and how they are built, below 2^64. Waits for the device."""
        total = torch.full((), self._digest_of_built, dtype=torch.int64, device=self._device)
        for table in self._shared():
            total = total * 6364136223846793005 + fingerprint(table)
        return total.item() % 2**64

    def shared_state(self) -> dict:
        """What all workers share; its tensors are not copies."""
        counters = {"done": self.done, "told": self.told}
        built = self._built | self._bits
        return {"built": built, **counters, "tensors": self._shared()}

    @torch.no_grad()
    def take_shared_state(self, state: dict) -> None:
        """Go on from what the others share; this worker's own state begins anew.

        Raises FleetRefused where they are built otherwise.
        """
        theirs = {key: value for key, value in state["built"].items() if key not in self._bits}
        if differing := differing_from(theirs, self.built):
            raise FleetRefused(
                f"the other workers are built otherwise: {differing}: start all of them alike"
            )
        unlike = [key for key, value in self._bits.items() if state["built"].get(key) != value]
        if unlike:
            raise FleetRefused(
                f"this worker gets other {unlike[0]} than the others: {WHY}, and every worker "
                f"decodes all messages: {INSTEAD}"
            )
        for table, new in zip(self._shared(), state["tensors"], strict=True):
            table.copy_(new)
        for batch in self.batches:
            batch.memory.zero_()
            torch._foreach_copy_(batch.params, batch.as_parameters(batch.model_shift))
        self.told = state["told"]
        self.go_on_after(state["done"] - self._within_step)
        for begin_anew in self._begin_inner:
            begin_anew()

    def __getstate__(self) -> dict:
        raise TypeError("a worker among others that come and go cannot be copied: save its state")


class FleetExchange(Exchange):
    """A worker's own part of a round, whose messages `gather` sends and counts."""

    def __init__(self, exchange: Exchange, gather: Callable[[Tensor], list[Tensor]]):
        super().__init__(exchange.owned, exchange.w2s_sizes, exchange.s2w_sizes, ALONE)
        self.gather = gather
        every = range(len(self.owned))
        self.size = sum(self._lengths(self.w2s_sizes, self.rank, every))

    def traffic_to_servers(self, bucket: range) -> Traffic:
        return Traffic()

    traffic_to_workers = traffic_to_servers

    def to_servers(self, payloads: list[Tensor], bucket: range) -> Callable[[], list]:
        message = torch.cat([payload.flatten() for payload in payloads])
        return lambda: self.parts(self.gather(message), bucket)

    def parts(self, messages: list[Tensor], bucket: range) -> list[tuple[Tensor, ...]]:
        """Of every batch of the bucket what each message has, (layers, w2s size)."""
        of_workers = [self._rows(m[None], self.w2s_sizes, self.rank, bucket) for m in messages]
        return [tuple(rows[place][0] for rows in of_workers) for place in range(len(bucket))]
