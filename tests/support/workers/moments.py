"""States of local steps on two ranks, loaded again while messages are under way, as `rank<r>.json`.

Run by torchrun with a directory.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.compressors import TopK

# Where servers are, and the steps before a state is taken: some leave a message under way.
MOMENTS = [("rank0", 6), ("sharded", 5), ("sharded", 6), ("replicated", 6)]
DELAYED = {"sync_every": 3, "sync_delay": 1, "w2s": TopK(0.3), "outer_momentum": 0.5}


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def take(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        inputs = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        model(inputs).sub(inputs[:, :4].sin()).square().mean().backward()
        optimizer.step()


def same(one, other) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def comes_back(server: str, steps: int) -> bool:
    """Whether a state of this step leads to the same end again, from other steps."""
    model = new_model()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = LocalSteps(inner, server=server, **DELAYED)
    take(model, optimizer, steps)
    weights, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    ends = []
    for more in (4, 2, 5):
        take(model, optimizer, more, first=steps)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        take(model, optimizer, 4, first=steps)
        ends.append(copy.deepcopy(model))
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    return same(ends[0], ends[1]) and same(ends[0], ends[2])


def loaded_apart() -> str:
    """What is said of a model that ranks have loaded differently before the first step."""
    model = new_model()
    inner = EF21Muon(model.parameters(), process_group=ALONE)
    optimizer = LocalSteps(inner, w2s=TopK(0.3))
    with torch.no_grad():
        model[0].weight.add_(dist.get_rank())
    take(model, optimizer, 1)
    try:
        optimizer.check_agreement()
    except ValueError as error:
        return str(error)
    return "nothing"


def main() -> None:
    dist.init_process_group("gloo")
    back = {f"{server} {steps}": comes_back(server, steps) for server, steps in MOMENTS}
    report = {"back": back, "loaded": loaded_apart()}
    path = Path(sys.argv[1]) / f"rank{dist.get_rank()}.json"
    path.write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
