"""Check on this machine or cluster what this repository promises: a table, a row for each claim.

    torchrun --standalone --nproc_per_node=2 scripts/verify.py

Any number of ranks and nodes; GPUs with NCCL where there are any, else CPUs with gloo. Tiny layers
are trained for a few steps in many ways, which takes seconds. A row fails if it does on any rank,
and shows the largest difference of all; the exit status is 0 if none fails.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ef21_muon import ALONE, EF21Muon
from ef21_muon.compressors import (
    Bernoulli,
    Compressor,
    Identity,
    Quantize,
    QuantizedRank,
    RandK,
    RankK,
    Scaled,
    TopColumns,
    TopK,
)
from ef21_muon.compressors.base import value_format
from ef21_muon.layers import PLACEMENTS
from ef21_muon.norms import Spectral
from scripts.verification import trials
from scripts.verification.trials import Parameters, local, ours, train
from training.report import table
from training.workers import Workers, exit_process

MIXED = {
    "hidden": RankK(0.2, "natural"),
    "heads": TopK(0.2, "natural4"),
    "biases": Quantize("int4"),
}
TOP = TopK(0.2)
COMPRESSORS = (
    Identity(),
    Quantize("natural"),
    Quantize("sign"),
    TopK(0.1, "natural4"),
    RandK(0.1, "int4@32"),
    RankK(0.2, "bfloat16"),
    QuantizedRank(0.2),
    TopColumns(0.2, "natural"),
    Scaled(Quantize("int4")),
    Bernoulli(TOP),
)
UNBIASED = ("natural", "natural3", "natural4", "int2", "int4", "int8")
# Every placement, compressed both ways where something is sent back; and local steps.
BACK = {server: {} if server == "replicated" else {"s2w": MIXED} for server in PLACEMENTS}
PLACED = [ours(MIXED, server=server, **back) for server, back in BACK.items()]
LOCAL = [local(MIXED, server=server, **back) for server, back in BACK.items()]
NOT_COMPARED = "one worker: nothing to compare"

Measurement = tuple[float, float]  # a difference, and the tolerance that it is within or not


@dataclass
class Claim:
    """`measured` says what the difference is; `of_several`, that it takes several workers."""

    text: str
    measured: str
    of_several: bool
    check: Callable[[Workers], Measurement]


CLAIMS: list[Claim] = []


def claim(text: str, measured: str, of_several: bool = False) -> Callable:
    """Registers the check of a claim, which all workers call at once."""

    def register(check: Callable) -> Callable:
        CLAIMS.append(Claim(text, measured, of_several, check))
        return check

    return register


@claim("identity equals Muon", "update, from torch.optim.Muon's")
def equals_muon(workers: Workers) -> Measurement:
    """In bfloat16 rounding alone may change an update by 2 %; a wrong option does by over 15 %."""
    defaults = torch.optim.Muon([Parameter(torch.zeros(1, 1))]).defaults

    def matrices(parameters: Parameters) -> list[Parameter]:
        return [parameter for parameter in parameters.values() if parameter.ndim == 2]

    def muon(parameters: Parameters) -> torch.optim.Muon:
        return torch.optim.Muon(matrices(parameters), lr=trials.LR)

    def uncompressed(parameters: Parameters) -> EF21Muon:
        return EF21Muon(
            matrices(parameters),
            lr=trials.LR,
            momentum=defaults["momentum"],
            norm=Spectral(scaling="muon", dtype=torch.bfloat16),
            nesterov=defaults["nesterov"],
            weight_decay=defaults["weight_decay"],
            momentum_init="zero",
        )

    expected, _ = train(workers, muon, average=True)
    found, _ = train(workers, uncompressed)
    return trials.update_distance(found, expected), 2.0**-4


@claim("identity equals Scion", "update, from the published one")
def equals_scion(workers: Workers) -> Measurement:
    expected, _ = train(workers, trials.Scion, average=True)
    found, _ = train(workers, ours(weight_decay=1.0, momentum_init="zero"))
    return trials.update_distance(found, expected), 1e-4


@claim("n workers equal one", "update, from one's on all batches", of_several=True)
def workers_equal_one(workers: Workers) -> Measurement:
    alone = dist.new_group([workers.rank], use_local_synchronization=True)
    expected, _ = train(workers, ours(process_group=alone), batch=range(workers.count))
    found, _ = train(workers, ours())
    return trials.update_distance(found, expected), 1e-4


@claim("local steps alone are the inner ones", "entries that differ")
def local_steps_are_inner_ones(workers: Workers) -> Measurement:
    expected, _ = train(workers, ours(process_group=ALONE))
    found, _ = train(workers, local(sync_every=1, process_group=ALONE))
    return trials.differing(found, expected), 0


@claim("a round of local steps is their mean", "update, from the mean one", of_several=True)
def rounds_are_means(workers: Workers) -> Measurement:
    expected, _ = train(workers, ours(process_group=ALONE))
    expected = {name: trials.mean_of(workers, x) for name, x in expected.items()}
    found, _ = train(workers, local())
    return trials.update_distance(found, expected), 1e-4


@claim(f"placements agree: {', '.join(PLACEMENTS)}", "entries that differ", of_several=True)
def placements_agree(workers: Workers) -> Measurement:
    difference = 0
    for method in (ours, local):
        first, *others = (train(workers, method(MIXED, server=server))[0] for server in PLACEMENTS)
        difference += sum(trials.differing(first, other) for other in others)
    return difference, 0


@claim("buckets agree: 1, 4", "entries that differ")
def buckets_agree(workers: Workers) -> Measurement:
    one, four = (train(workers, ours(MIXED, MIXED, buckets=buckets))[0] for buckets in (1, 4))
    return trials.differing(one, four), 0


@claim("all workers hold the same parameters", "layers that differ", of_several=True)
def parameters_are_the_same(workers: Workers) -> Measurement:
    models = [train(workers, build)[0] for build in PLACED + LOCAL]
    return sum(trials.differing_on_workers(workers, model.values()) for model in models), 0


@claim("the servers' G is the mean of the G_j", "relative distance")
def servers_have_the_mean(workers: Workers) -> Measurement:
    distances = []
    for build in PLACED:
        parameters, optimizer = train(workers, build)
        for parameter in parameters.values():
            mean = trials.mean_of(workers, optimizer.state[parameter]["gradient_estimate"])
            distances.append(trials.distance(trials.server_gradient(optimizer, parameter), mean))
    return trials.largest(distances), 1e-5


@claim(f"error feedback contracts, {TOP}", "||G_j - g||^2 over (1 - alpha) times the last")
def feedback_contracts(workers: Workers) -> Measurement:
    """For a constant gradient g."""
    ratios, last = [], dict.fromkeys(trials.SHAPES, 1.0)
    for parameters, optimizer in trials.constant_gradients(workers, "ef21", TOP, steps=4):
        for name, parameter in parameters.items():
            g, state = trials.as_matrix(parameter.grad), optimizer.state[parameter]
            left = trials.distance(state["gradient_estimate"], g) ** 2
            ratios.append(left / last[name] / (1 - TOP.alpha(*g.shape)))
            last[name] = left
    return trials.largest(ratios), 1


@claim(f"error feedback converges, {TOP}", "||G - g|| after 8 steps, over without")
def feedback_converges(workers: Workers) -> Measurement:
    errors = []
    for feedback in ("ef21", "none"):
        *_, (parameters, optimizer) = trials.constant_gradients(workers, feedback, TOP, steps=8)
        gradients = {
            parameter: trials.mean_of(workers, trials.as_matrix(parameter.grad))
            for parameter in parameters.values()
        }
        errors.append(
            [
                trials.distance(trials.server_gradient(optimizer, parameter), g)
                for parameter, g in gradients.items()
            ]
        )
    return trials.largest(map(torch.div, *errors)), 1e-4


@claim("messages are payload_bytes long", "bytes")
def messages_have_their_size(workers: Workers) -> Measurement:
    difference = 0
    for compressor, x in messages(workers):
        message = compressor.encode(x.expand(3, -1, -1), trials.new_generator(workers.device))
        difference += abs(message.numel() - 3 * compressor.payload_bytes(*x.shape[1:]))
    return difference, 0


@claim("w2s_bytes is the messages' sum", "bytes")
def messages_are_counted(workers: Workers) -> Measurement:
    difference = 0
    for compressor in COMPRESSORS:
        parameters, optimizer = train(workers, ours(dict.fromkeys(trials.ROLES, compressor)))
        sent = 0
        for x in map(trials.as_matrix, parameters.values()):
            message = compressor.fit(*x.shape).encode(x[None], trials.new_generator(x.device))
            sent += trials.STEPS * message.numel()
        difference += abs(optimizer.w2s_bytes - sent)
    return difference, 0


@claim("wire_tx_bytes is what is sent", "bytes", of_several=True)
def sent_bytes_are_counted(workers: Workers) -> Measurement:
    difference = 0
    for build in PLACED + LOCAL:
        parameters, optimizer = trials.new(workers, build)
        with trials.Sent(workers) as sent:
            trials.descend(workers, parameters, optimizer)
        difference += abs(optimizer.wire_tx_bytes - sent.bytes)
    return difference, 0


@claim(f"unbiased: {', '.join(UNBIASED)}", "mean error, in steps of the format")
def formats_are_unbiased(workers: Workers) -> Measurement:
    """Of many roundings of one number to its neighbours; a 1 before them gives the scale.

    By Hoeffding's inequality a mean is further off than the tolerance with probability 1e-9.
    """
    draws, errors = 200_000, []
    for codec in map(value_format, UNBIASED):
        for number in (0.7, -0.11, 0.007):
            values = torch.full((1, 1, draws + 1), number, device=workers.device)
            values[..., 0] = 1
            message = codec.encode(values, trials.new_generator(workers.device))
            rounded = codec.decode(message, 1, draws + 1)[..., 1:].double()
            error = rounded.mean() - values[..., 1].double()
            errors.append(error.abs() / (rounded.max() - rounded.min()))
    return trials.largest(errors), sqrt(log(2 / 1e-9) / (2 * draws))


@claim("messages decode alike everywhere", "layers that differ", of_several=True)
def decoding_agrees(workers: Workers) -> Measurement:
    """The messages of rank 0."""
    decoded = []
    for compressor, x in messages(workers):
        message = compressor.encode(x, trials.new_generator(workers.device))
        dist.broadcast(message, 0)
        decoded.append(compressor.decode(message, *x.shape[1:]))
    return trials.differing_on_workers(workers, decoded), 0


def messages(workers: Workers) -> Iterator[tuple[Compressor, Tensor]]:
    """What there is to encode: every compressor, and this worker's (1, m, n) of every shape."""
    for compressor in COMPRESSORS:
        for shape in trials.SHAPES.values():
            x = trials.as_matrix(trials.gaussian(shape, workers.device, 0, workers.rank))
            yield compressor, x[None]


def row(claim: Claim, workers: Workers) -> list[str]:
    """The claim's row, the same on all ranks."""
    if claim.of_several and workers.count == 1:
        return [claim.text, claim.measured, "", "", NOT_COMPARED]
    try:
        mine = claim.check(workers)
    except Exception:
        print(f"rank {workers.rank}: the check of '{claim.text}' broke", file=sys.stderr)
        raise
    differences, tolerances = zip(*workers.gather(mine), strict=True)
    difference, tolerance = trials.largest(differences), min(tolerances)
    result = "pass" if difference <= tolerance else "FAIL"
    return [claim.text, claim.measured, f"{difference:.2g}", f"{tolerance:.2g}", result]


def verify(workers: Workers) -> int:
    """Check every claim and print the table; returns the exit status."""
    backend = dist.get_backend() if dist.is_initialized() else "no process group"
    workers.say(f"workers: {workers.count}, {workers.device.type}, {backend}\n")
    rows = [row(claim, workers) for claim in CLAIMS]
    workers.say(table([["claim", "measured", "difference", "tolerance", "result"], *rows]))
    failed = sum(cells[-1] == "FAIL" for cells in rows)
    workers.say(f"\n{failed} of {len(rows)} claims fail")
    return 1 if failed else 0


def main() -> int:
    workers = Workers()
    return workers.run(lambda: verify(workers))


if __name__ == "__main__":
    exit_process(main())
