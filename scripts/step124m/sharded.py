"""What the ranks of a worker hold of a sharded model and its optimizer, after a step.

    torchrun --standalone --nproc_per_node=4 scripts/step124m/sharded.py ranks_per_worker=4

KEY=VALUE are Hydra overrides, as of train.py; `fsdp=true` is given. Every rank takes the gradient
of one sequence and steps with it twice. Memory is what torch's CPU allocator still has handed out
after the second step (parameters, whole copies, gradients, state), and the most in that step beyond
it, as torch.profiler records it. The records go to sharded.jsonl in the folder `--out`, and from
them comes sharded.md.
"""

import argparse
import shlex
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from model import GPT
from scripts.measuring import by_ranks
from scripts.step124m.allocations import Allocations, Phases
from scripts.studies import OVERRIDES, command, markdown, page
from training.config import ROOT, build, compose
from training.method import build_optimizer
from training.renamed import modern_overrides
from training.sharding import new_worker_mesh, shard
from training.weights import draw_weights
from training.workers import Workers, exit_process

LOG = ROOT / "results" / "step124m" / "sharded.jsonl"


def measure(options: argparse.Namespace, workers: Workers) -> list[dict]:
    """Bytes of every rank, and what they are bounded by."""
    config = compose((*options.overrides, "fsdp=true")).config
    mesh = new_worker_mesh(config.ranks_per_worker, workers)
    tokens = torch.zeros(1, config.model.context, dtype=torch.int64)
    with Allocations(shapes=False) as built:
        with torch.device("meta"):
            model = GPT(build(config.model, "model"))
        shard(model, mesh)
        draw_weights(model, config.seed, workers)
        optimizer = build_optimizer(config, model, mesh=mesh)
        model(tokens, tokens).backward()
        optimizer.step()
    optimizer.timer = Phases()
    model(tokens, tokens).backward()
    with Allocations() as again:
        optimizer.step()
    parameters, ranks = model.config.parameter_count, config.ranks_per_worker
    largest = max(parameter.numel() for parameter in model.parameters())
    state = sum(x.nbytes for of in optimizer.state.values() for x in of.values())
    (of_worker,) = optimizer.mesh.total(state)
    whole = 4 * parameters + of_worker
    mine = {
        "rank": workers.rank,
        "kept_bytes": built.kept,
        "state_bytes": state,
        "peak_bytes": max(memory.peak for memory in again.phases.values()),
        "whole_bytes": whole,
        "bound_bytes": 2 * (whole // ranks + 4 * largest),
        "ranks": ranks,
        "workers": workers.count // ranks,
        "parameters": parameters,
        "torch": torch.__version__,
        "overrides": options.overrides,
    }
    return workers.gather(mine)


def report(records: list[dict]) -> str:
    facts = records[0]
    heading = ["held, MB", "of it state", "share of the whole", "bound, MB", "step, MB beyond"]
    rows = [["rank", *heading]]
    for one in records:
        held = one["kept_bytes"]
        rows.append(
            [
                str(one["rank"]),
                f"{held / 1e6:.0f}",
                f"{one['state_bytes'] / 1e6:.0f}",
                f"{held / one['whole_bytes']:.2f}",
                f"{one['bound_bytes'] / 1e6:.0f}",
                f"{one['peak_bytes'] / 1e6:.0f}",
            ]
        )
    launch = f"--nproc_per_node={len(records)} scripts/step124m/sharded.py"
    return f"""# What a rank holds of a sharded model

`torchrun --standalone {launch} {shlex.join(modern_overrides(facts["overrides"]))}`

{facts["workers"]} worker(s) of {facts["ranks"]} ranks, {facts["parameters"]:,} parameters, torch
{facts["torch"]}, CPU. A worker holds {facts["whole_bytes"] / 1e6:.0f} MB in all: parameters and the
optimizer's state. A rank holds its rows of every layer, and of the layers that it owns a whole copy
and the state. The bound is twice the sum of a fair share of the whole and of the largest layer's
matrix.

{markdown(rows)}
"""


def main() -> int:
    return command(__doc__, LOG, by_ranks(measure), page(report, "sharded.md"), OVERRIDES)


if __name__ == "__main__":
    exit_process(main())
