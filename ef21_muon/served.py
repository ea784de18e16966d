"""What optimizers with servers have in common: from workers to the servers of layers, and back."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ef21_muon.arithmetic import (
    REPLICATED,
    SAFE,
    WHY,
    Results,
    advice_for,
    of_messages,
    unlike,
)
from ef21_muon.checks import PARTED, refuse_compressed_shifts, require_mean_estimate
from ef21_muon.communicating import CommunicatingOptimizer
from ef21_muon.exchange.collectives import Exchange, Traffic, place_in
from ef21_muon.exchange.layers import (
    ServedBatch,
    finite,
    mark,
    relative_error,
    traffic_by_placement,
)
from ef21_muon.exchange.phases import Phase, current
from ef21_muon.exchange.placement import AUTO
from ef21_muon.identity import described
from ef21_muon.messages.feedback import EF21

log = logging.getLogger(__name__)

Receive: TypeAlias = Callable[[], list]


class ServedOptimizer(CommunicatingOptimizer):
    """A communicating optimizer whose rounds are Algorithm 1's: messages to servers, and back.

    A subclass sets `phases` and `feedback`, and says of a batch of layers what a worker sends
    (`_worker_message`), what its servers make of the messages of all workers (`_receive`), what
    they send (`_server_message`) and what a worker makes of that (`_update`). Where the mean of
    what workers sent of a layer is not finite, its servers send no change: W stays as it was on all
    workers until the one who sent it is named by `check_finite`, and by `check_agreement` on all.

    While `watch` is True what messages lose is recorded; when `watched` is True too it is there of
    all layers, for `diagnostics`.
    """

    server: str  # the placement
    batches: list[ServedBatch]
    phases: list[Phase]
    feedback: type[EF21]
    _watch = False

    @property
    def watch(self) -> bool:
        """Whether to record; setting it forgets what was recorded before."""
        return self._watch

    @watch.setter
    def watch(self, value: bool) -> None:
        self._watch = value
        for batch in self.batches:
            batch.contraction = None

    @property
    def watched(self) -> bool:
        """Whether a message of every layer was recorded since `watch` was set."""
        return all(batch.contraction is not None for batch in self.batches)

    def _place_servers(self, server: str, groups: list[dict], costs: list[int]) -> None:
        """Choose the placement; `placements` has the traffic of those that there were to choose."""
        self.placements, allowed = {}, [server]
        if server == AUTO:
            _, ranks = place_in(self.process_group)
            self.placements = traffic_by_placement(groups, costs, ranks)
            allowed = [*self.placements]
        if allowed[0] == "replicated":
            refuse_compressed_shifts(groups)
        self.server = self._where_bits_agree(allowed, groups)

    def _where_bits_agree(self, allowed: list[str], groups: list[dict]) -> str:
        """The first placement, or the next but "replicated" if ranks get other bits in that.

        Raises ValueError where they do in all that are allowed.
        """
        first, *others = allowed
        if place_in(self.process_group)[1] == 1:
            return first
        device = next(p.device for group in groups for p in group["params"])
        found = unlike(self._recomputed(groups, first), device, self.process_group)
        if found is None:
            return first
        what, rank = found
        words = f"rank {rank} gets other bits than rank 0 of {what}: {WHY}, and "
        others = [one for one in others if one != "replicated"]
        if not (first == "replicated" and others and what.startswith(REPLICATED)):
            raise ValueError(words + advice_for(what))
        if place_in(self.process_group)[0] == 0:
            log.warning("%sserver=auto is therefore %s, not replicated", words, others[0])
        return self._where_bits_agree(others, groups)

    def _recomputed(self, groups: list[dict], server: str) -> Results:
        """What every worker computes for itself, of numbers that are alike on all, by its name.

        All have to get the same bits of it. groups: with the entries params, w2s and s2w.
        """
        yield from of_messages("s2w", groups)
        if server == "replicated":
            yield from of_messages("w2s", groups)

    def _why_parted(self) -> str:
        elsewhere = "give server=sharded or rank0, " if self.server == "replicated" else ""
        return PARTED.format(f"{elsewhere}give {SAFE}, or ")

    def _settings(self) -> dict:
        settings = super()._settings() | {"feedback": self.feedback.__name__}
        for index, rule in enumerate(getattr(self, "rules", self.param_groups)):
            for direction in ("w2s", "s2w"):
                settings[f"{direction} of group {index}"] = described(rule[direction])
        server = settings.pop("server")  # last, since "auto" follows from the others
        # The steps of one worker are the same wherever its servers are.
        return settings if self.ranks == 1 else settings | {"server": server}

    @property
    def exchange(self) -> Exchange:
        """The collectives of the next round."""
        return current(self.phases, self.round).exchange

    def _exchange(self) -> Traffic:
        """A round's messages: of every bucket to the servers, while the next one is encoded; back.

        Returns what they take.
        """
        phase = current(self.phases, self.round)
        to_servers = [self._to_servers(phase, bucket) for bucket in phase.buckets]
        to_workers = [
            self._to_workers(phase, bucket, receive)
            for bucket, receive in zip(phase.buckets, to_servers, strict=True)
        ]
        for bucket, receive in zip(phase.buckets, to_workers, strict=True):
            self._to_parameters(bucket, receive)
        return phase.exchange.traffic() + self._average_buffers()

    def _average_buffers(self) -> Traffic:
        """What that takes of a whole worker, whose ranks have statistics of their own."""
        with self.timer("exchange"):
            traffic = self.buffers.average()
        ranks = self.lanes.worker_size if self.lanes else 1
        return replace(
            traffic,
            w2s_bytes=ranks * traffic.w2s_bytes,
            received_bytes=ranks * traffic.received_bytes,
        )

    def _to_servers(self, phase: Phase, bucket: range) -> Receive:
        """Encode what this worker sends of a bucket of batches, and start to send it."""
        with self.timer("encode"):
            messages = []
            for b in bucket:
                self.batches[b].w2s = phase.w2s[b]
                messages.append(self._worker_message(self.batches[b]))
        with self.timer("exchange"):
            return phase.exchange.to_servers(messages, bucket)

    def _to_workers(self, phase: Phase, bucket: range, receive: Receive) -> Receive:
        """Serve the layers owned here with what workers have sent, and start to send the result."""
        with self.timer("exchange"):
            messages = receive()
        with self.timer("decode"):
            for b, from_workers in zip(bucket, messages, strict=True):
                if self.batches[b].serves:
                    self._receive(self.batches[b], from_workers)
        with self.timer("server"):
            messages = [self._serve(self.batches[b]) for b in bucket]
        with self.timer("exchange"):
            return phase.exchange.to_workers(messages, bucket)

    def _to_parameters(self, bucket: range, receive: Receive) -> None:
        """Update the layers of a bucket by what their servers have sent."""
        with self.timer("exchange"):
            messages = receive()
        with self.timer("decode"):
            for b, message in zip(bucket, messages, strict=True):
                batch = self.batches[b]
                self._update(batch, batch.s2w.decode(message, *batch.shape))

    def _serve(self, batch: ServedBatch) -> Tensor:
        """The payload for the layers owned here, which may be none."""
        if batch.serves:
            return self._server_message(batch)
        size = batch.s2w.payload_bytes(*batch.shape)
        return torch.empty(0, size, dtype=torch.uint8, device=batch.broken_at.device)

    def _worker_message(self, batch: ServedBatch) -> Tensor:
        """The payload of this worker, one row a layer."""
        raise NotImplementedError

    def _receive(self, batch: ServedBatch, from_workers: tuple[Tensor, ...]) -> None:
        """from_workers: of each worker the payloads (layers owned here, bytes)."""
        raise NotImplementedError

    def _server_message(self, batch: ServedBatch) -> Tensor:
        """The payload for the layers owned here, one row a layer."""
        raise NotImplementedError

    def _update(self, batch: ServedBatch, received: Tensor) -> None:
        """received: (L, m, n), what the servers have sent."""
        raise NotImplementedError

    def _compress(
        self, batch: ServedBatch, target: Tensor, memory: Tensor, error_decay: float
    ) -> Tensor:
        """Lines 10-11 of Algorithm 1: the payload of R_j for `target` (L, m, n)."""
        difference = self.feedback.difference(target, memory, error_decay)
        message = batch.w2s.encode(difference, self.generators["w2s"])
        sent = batch.w2s.decode(message, *batch.shape)
        mark(batch.unsent_at, ~finite(sent), self.steps + 1)
        self.feedback.remember(memory, difference, sent)
        if self.watch:
            estimate = self.feedback.estimate(memory, sent)
            batch.contraction = 1 - relative_error(sent, difference).square_()
            batch.estimator_error = relative_error(estimate, target)
        return message

    @staticmethod
    def _add_mean(batch: ServedBatch, total: Tensor, from_workers: tuple[Tensor, ...]) -> None:
        """Add the mean of all workers' messages."""
        for message in from_workers:
            received = batch.w2s.decode(message, *batch.shape)
            total += received * (1 / len(from_workers))  # rounded twice: fused on some processors

    def check_agreement(self) -> None:
        """Raise ValueError if workers hold different W, or if EF21's G is not the mean of G_j.

        Names rank and layer; to be called on all ranks. Waits for the device. The second is told
        from random projections, so that a few bytes a layer are sent.
        """
        self.require_own_parameters("check_agreement()")
        super().check_agreement()
        if self.feedback.accumulates:  # the others remember no G_j
            require_mean_estimate(self._arrived(), self.process_group)

    def _arrived(self) -> list[ServedBatch]:
        """The batches whose messages have all come to the servers."""
        return self.batches

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What compression did to each layer in the last messages that were watched.

        `w2s_contraction`: 1 - ||C_j(x) - x||^2 / ||x||^2 of this worker's message, the alpha that
        it achieved. `estimator_error`: ||M_j - G_j|| / ||M_j||. `model_shift_error`, of the layers
        served here: ||X - W|| / ||X||. Waits for the device. RuntimeError if it was not watched.
        """
        self.require_own_parameters("diagnostics()")
        if not self.watched:
            raise RuntimeError("nothing was recorded: set watch=True before the step")
        result = {}
        for batch in self.batches:
            columns = {
                "w2s_contraction": batch.contraction.tolist(),
                "estimator_error": batch.estimator_error.tolist(),
            }
            for layer, name in enumerate(batch.names):
                result[name] = {key: values[layer] for key, values in columns.items()}
            served, errors = batch.names[batch.owned], batch.shift_error()
            errors = [0.0] * len(served) if errors is None else errors.tolist()
            for name, error in zip(served, errors, strict=True):
                result[name]["model_shift_error"] = error
        return result
