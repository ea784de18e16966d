"""Check on this machine or cluster what this repository promises: a table, a row for each claim.

    torchrun --standalone --nproc_per_node=2 scripts/verify.py

Any number of ranks and nodes; GPUs with NCCL where there are any, else CPUs with gloo. Tiny layers
are trained for a few steps in many ways, which takes seconds. A row fails if it does on any rank,
and shows the largest difference of all; the exit status is 0 if none fails.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Generator
from torch.nn import Parameter

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ef21_muon import ALONE, EF21Muon
from ef21_muon.compressors import from_spec
from ef21_muon.layers import PLACEMENTS
from ef21_muon.norms import Spectral
from scripts.verification import trials
from scripts.verification.trials import Parameters, local, ours, train
from training.report import table
from training.workers import Workers, exit_process

MIXED = {"hidden": "rank:0.2:natural", "heads": "topk:0.2:natural4", "biases": "quantize:int4"}
SPECS = (
    *("identity", "quantize:natural", "quantize:sign", "topk:0.1:natural4", "randk:0.1:int4@32"),
    *("rank:0.2:bfloat16", "quantized_rank:0.2", "top_columns:0.2:natural"),
    *("scaled:quantize:int4", "bernoulli:0.5:topk:0.2"),
)
COMPRESSORS = tuple(map(from_spec, SPECS))
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
    return lambda check: CLAIMS.append(Claim(text, measured, of_several, check))


@claim("identity equals Muon", "update, from torch.optim.Muon's")
def equals_muon(workers: Workers) -> Measurement:
    """In bfloat16 rounding alone may change an update by 2 %; a wrong option does by over 15 %."""
    defaults = torch.optim.Muon([Parameter(torch.zeros(1, 1))]).defaults
    options = {name: defaults[name] for name in ("momentum", "nesterov", "weight_decay")}
    options["norm"] = Spectral(scaling="muon", dtype=torch.bfloat16)

    def matrices(parameters: Parameters) -> list[Parameter]:
        return [parameter for parameter in parameters.values() if parameter.ndim == 2]

    def muon(parameters: Parameters) -> torch.optim.Muon:
        return torch.optim.Muon(matrices(parameters), lr=trials.LR)

    def uncompressed(parameters: Parameters) -> EF21Muon:
        return EF21Muon(matrices(parameters), lr=trials.LR, momentum_init="zero", **options)

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


@claim("w2s_bytes is the messages' sum", "bytes")
def messages_are_counted(workers: Workers) -> Measurement:
    difference = 0
    for compressor in COMPRESSORS:
        parameters, optimizer = train(workers, ours(dict.fromkeys(trials.ROLES, compressor)))
        sent = 0
        for x in map(trials.as_matrix, parameters.values()):
            message = compressor.fit(*x.shape).encode(x[None], Generator(x.device).manual_seed(0))
            sent += trials.STEPS * message.numel()
        difference += abs(optimizer.w2s_bytes - sent)
    return difference, 0


@claim("wire_tx_bytes is what is sent", "bytes", of_several=True)
def sent_bytes_are_counted(workers: Workers) -> Measurement:
    difference = 0
    for build in PLACED + LOCAL:
        sent = trials.Sent(workers)
        _, optimizer = train(workers, build, inside=sent)
        difference += abs(optimizer.wire_tx_bytes - sent.bytes)
    return difference, 0


@claim("messages decode alike everywhere", "layers that differ", of_several=True)
def decoding_agrees(workers: Workers) -> Measurement:
    """The messages of rank 0, of every compressor and shape."""
    decoded = []
    for compressor, shape in product(COMPRESSORS, trials.SHAPES.values()):
        x = trials.as_matrix(trials.gaussian(shape, workers.device, 0, workers.rank))
        message = compressor.encode(x[None], Generator(x.device).manual_seed(0))
        dist.broadcast(message, 0)
        decoded.append(compressor.decode(message, *x.shape))
    return trials.differing_on_workers(workers, decoded), 0


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


if __name__ == "__main__":
    workers = Workers()
    exit_process(workers.run(lambda: verify(workers)))
