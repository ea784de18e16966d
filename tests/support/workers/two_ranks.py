"""What two ranks do with options that one rank alone would not distinguish.

Run by torchrun with a directory, rank r writes `rank<r>.json` there: what every function of CASES
returns. See test_two_ranks.py.
"""

import copy
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import Quantize, RankK, TopK
from ef21_muon.norms import Sign
from ef21_muon.transport import fixed
from training.workers import exit_process

COUNTS = ("w2s_bytes", "s2w_bytes", "received_bytes", "wire_tx_bytes")
PLACEMENTS = ("sharded", "rank0", "replicated")
FIRST, LATER = TopK(0.2), RankK(0.4)


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(model, optimizer, steps, first=0):
    """On another batch on every rank."""
    for step in range(first, first + steps):
        seed = 2 * step + dist.get_rank()
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(inputs).sub(inputs[:, :4].sin()).square().mean().backward()
        optimizer.step()


def values(model) -> list:
    return [parameter.tolist() for parameter in model.parameters()]


def everything(model, optimizer) -> list:
    """The parameters, all that is remembered, and the bytes."""
    nested = [optimizer, *optimizer.inner]
    remembered = [
        {key: t.tolist() for key, t in own.items()} for o in nested for own in o.state.values()
    ]
    return [values(model), remembered, [getattr(optimizer, count) for count in COUNTS]]


def sgd(p):
    return torch.optim.SGD(p, lr=0.1, momentum=0.9)


EXCHANGING = {
    "ef21": lambda p, w2s, server: EF21Muon(p, w2s=w2s, server=server),
    "local": lambda p, w2s, server: LocalSteps(
        sgd(p), sync_every=2, w2s=w2s, server=server, outer_momentum=0.5
    ),
    "averaged": lambda p, w2s, server: AveragedGradients(sgd(p), w2s=w2s, server=server),
}


# Every method, and every placement.
EXCHANGED = (
    *(("ef21", server) for server in PLACEMENTS),
    *(("local", "sharded"), ("averaged", "replicated")),
)
UNDER_WAY = (("sharded", False), ("sharded", True), ("rank0", True), ("replicated", False))


def exchanged(make: Callable, server: str) -> dict:
    """What it gives with another compressor from step 2 on, and what one built with that gives."""
    model = new_model()
    optimizer = make(model.parameters(), FIRST, server)
    train(model, optimizer, 2)
    optimizer.exchange_compressor(LATER)
    other_model = copy.deepcopy(model)
    other = make(other_model.parameters(), LATER, server)
    other.load_state_dict(optimizer.state_dict())
    for one in ((model, optimizer), (other_model, other)):
        train(*one, 2, first=2)
    optimizer.check_agreement()
    return {"found": everything(model, optimizer), "built": everything(other_model, other)}


def exchanged_apart() -> str:
    """What is said where ranks exchange it for different ones."""
    model = new_model()
    optimizer = EF21Muon(model.parameters(), w2s=FIRST)
    try:
        optimizer.exchange_compressor(TopK((0.1, 0.3)[dist.get_rank()]))
    except ValueError as error:
        return str(error)
    return ""


def in_bfloat16(server: str) -> dict:
    """W, X and what a resume after half of the steps gives."""

    def new():
        parameter = nn.Parameter(torch.ones(4, 1, dtype=torch.bfloat16))
        return parameter, EF21Muon([parameter], lr=1e-3, norm=Sign(), server=server)

    def step(parameter, optimizer):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    parameter, optimizer = new()
    for _ in range(10):
        step(parameter, optimizer)
    resumed, other = new()
    resumed.data.copy_(parameter.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(10):
        step(parameter, optimizer)
        step(resumed, other)
    optimizer.check_agreement()
    models = [
        one.state[p].get("server_model") for p, one in ((parameter, optimizer), (resumed, other))
    ]
    models = [None if model is None else model.tolist() for model in models]
    return {"W": [parameter.tolist(), resumed.tolist()], "X": models}


def copies_alone() -> dict:
    """Of local steps around an optimizer that is alone, and what pickle and deepcopy make of it."""
    model = new_model()
    inner = EF21Muon(model.parameters(), w2s=TopK(0.3), process_group=ALONE)
    optimizer = LocalSteps(inner, sync_every=100, process_group=ALONE)
    train(model, optimizer, 2)
    result = {}
    for name, (copied, other) in {
        "as it is": (model, optimizer),
        "pickle": pickle.loads(pickle.dumps((model, optimizer))),
        "deepcopy": copy.deepcopy((model, optimizer)),
    }.items():
        sent = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "batch_isend_irecv", lambda works, sent=sent: sent.append(works))
            patch.setattr(dist, "all_reduce", lambda *given, sent=sent, **named: sent.append(given))
            if copied is not model:
                train(copied, other, 3, first=2)
        result[name] = [len(sent), copied, other]
    train(model, optimizer, 3, first=2)
    return {name: [sent, everything(*one)] for name, (sent, *one) in result.items()}


def back_to_workers(backend: str, method: str) -> dict:
    """What steps give where this backend is said to send, and how often it broadcasts."""
    make = {
        "ef21": lambda p: EF21Muon(p, w2s=FIRST, s2w=Quantize("int4"), server="sharded"),
        "rank0": lambda p: EF21Muon(p, w2s=FIRST, server="rank0"),
        "local": lambda p: LocalSteps(sgd(p), sync_every=2, s2w=TopK(0.5), server="sharded"),
    }[method]
    calls, broadcast = [], dist.broadcast

    def counted(*arguments, **options):
        calls.append(arguments)
        return broadcast(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed, "sends_by_nccl", lambda group, device: backend == "nccl")
        patch.setattr(dist, "broadcast", counted)
        model = new_model()
        optimizer = make(model.parameters())
        before = len(calls)
        train(model, optimizer, 4)
        in_steps = len(calls) - before
        optimizer.check_agreement()
    *found, counts = everything(model, optimizer)
    received = int(optimizer.traffic.wire_rx_bytes)
    return {"found": found, "counts": counts, "received": received, "broadcasts": in_steps}


def under_way(server: str, streaming: bool) -> str:
    """What check_agreement says of EF21 with a delay, after every step and at the end."""
    model = new_model()
    options = {"w2s": FIRST, "feedback": "ef21", "server": server, "streaming": streaming}
    optimizer = LocalSteps(sgd(model.parameters()), sync_every=5, sync_delay=2, **options)
    late = []
    try:
        optimizer.check_agreement()
        for step in range(12):
            train(model, optimizer, 1, first=step)
            optimizer.check_agreement()
            late.append(len(optimizer.under_way))
        optimizer.final_sync()
        optimizer.check_agreement()
    except (ValueError, RuntimeError) as error:
        return repr(error)
    return f"{max(late)} of {len(optimizer.batches)} late, then {len(optimizer.under_way)}"


CASES = {
    **{
        f"exchanged {method} {server}": lambda m=method, s=server: exchanged(EXCHANGING[m], s)
        for method, server in EXCHANGED
    },
    "exchanged apart": exchanged_apart,
    **{f"bfloat16 {server}": lambda s=server: in_bfloat16(s) for server in PLACEMENTS},
    "alone": copies_alone,
    **{
        f"back {method} {backend}": lambda b=backend, m=method: back_to_workers(b, m)
        for method in ("ef21", "rank0", "local")
        for backend in ("gloo", "nccl")
    },
    **{
        f"under way {server} {streaming}": lambda s=server, t=streaming: under_way(s, t)
        for server, streaming in UNDER_WAY
    },
}


def main(directory):
    dist.init_process_group("gloo")
    report = {name: run() for name, run in CASES.items()}
    (directory / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exit_process(0)
