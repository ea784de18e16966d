"""Where time and memory of a step go on CPUs, beside torch's AdamW and Muon; what shards hold.

    torchrun --standalone --nproc_per_node=2 scripts/step124m/run.py model=gpt2-124m
    torchrun --nproc_per_node=4 scripts/step124m/run.py --sharded model=gpt2-124m ranks_per_worker=4

KEY=VALUE are Hydra overrides, as of train.py. Every worker takes the gradient of one sequence and
steps with it, again and again, for every method. Seconds are the least of `--steps` steps; memory
is what torch's allocator handed out in one more step, temporaries inside of operators included, as
torch.profiler records it. torch.optim.Muon steps a single block, since its bfloat16 takes minutes
for all of them on CPUs that lack it; the table multiplies. With --sharded, `fsdp=true` is given,
and every rank steps twice with its gradient: what the allocator still has handed out then, and the
most in the second step beyond it. The records go to the folder `--out`, and from them comes
README.md or sharded.md.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from omegaconf import DictConfig
from torch import nn

from data.loader import WorkerBatches
from ef21_muon.checks.guards import PhaseTimer
from ef21_muon.transport.agreement import UNEQUAL, require_equal_parameters
from model import GPT
from scripts.measuring import by_ranks, processor
from scripts.step124m.allocations import Allocations, Phases
from scripts.studies import OVERRIDES, command, markdown, page
from training.config import ROOT, build, compose
from training.data import open_data
from training.method import build_optimizer
from training.renamed import modern_overrides
from training.sharding import new_worker_mesh, shard
from training.weights import draw_weights
from training.workers import RunError, Workers, exit_process

LOG = ROOT / "results" / "step124m" / "step124m.jsonl"
SHARDED_LOG = LOG.with_name("sharded.jsonl")
OPTIONS = {
    **OVERRIDES,
    "--steps": {"type": int, "default": 2, "help": "timed steps"},
    "--sharded": {"action": "store_true", "help": "what ranks hold of a sharded model"},
}
# How records and tables name what is not a step of EF21-Muon.
GRADIENT = "gradient"
ADAMW, MUON = "`torch.optim.AdamW`", "`torch.optim.Muon`, one block"
RANK = ["compressor@w2s=rank", "w2s.fraction=0.15"]
METHODS = {
    "identity": ["compressor@w2s=identity"],
    "rank 15% natural": RANK,
    "top 15% natural": ["compressor@w2s=topk", "w2s.fraction=0.15"],
    "rank 15% natural both ways": [*RANK, "compressor@s2w=rank", "s2w.fraction=0.15"],
}


def measure(workers: Workers, timer: PhaseTimer, steps: int, step: Callable) -> dict[str, dict]:
    """Seconds and memory of every phase of a step that is timed by `timer`."""
    times = []
    for _ in range(steps):
        workers.gather(None)  # all start together
        timer.read()
        step()
        times.append(timer.read())
    with Allocations() as allocations:
        step()
    return {
        phase: {"seconds": round(min(seconds[phase] for seconds in times), 4), **vars(memory)}
        for phase, memory in allocations.phases.items()
        if phase in times[0]
    }


def measure_gradient(config: DictConfig, model: GPT, workers: Workers, steps: int) -> dict:
    """Forward and backward of one sequence of this worker; its gradients stay in the model."""
    tokens, _ = open_data(config)
    batches = WorkerBatches(tokens, model.config.context, workers.rank, workers.count, config.seed)
    inputs, targets = batches.next(1)
    timer = Phases()

    def step() -> None:
        model.zero_grad()
        with timer("forward_backward"):
            model(inputs, targets).backward()

    return measure(workers, timer, steps, step)


def measure_optimizer(
    new: Callable[[], torch.optim.Optimizer], module: nn.Module, workers: Workers, steps: int
) -> dict:
    """What an optimizer keeps after its first step, and its steps with a module's gradients.

    One of torch's steps alone, in a single phase.
    """
    timer = Phases()
    with Allocations() as allocations:
        optimizer = new()
        in_phases = hasattr(optimizer, "timer")
        optimizer.timer = timer
        optimizer.step()

    def whole_step() -> None:
        with timer("step"):
            optimizer.step()

    count = sum(parameter.numel() for parameter in module.parameters())
    state = {"state": {"state_bytes": allocations.kept, "of_parameters": count}}
    return state | measure(workers, timer, steps, optimizer.step if in_phases else whole_step)


def measure_all(options: argparse.Namespace, workers: Workers) -> Iterator[dict]:
    """The records of all ranks, on all of them."""
    if workers.device.type != "cpu" or workers.count < 2:
        raise RunError(
            f"{workers.count} workers on {workers.device.type} were started: give 2 or more on "
            "the CPU, with torchrun, and with CUDA_VISIBLE_DEVICES= where there is a GPU"
        )
    config = compose(tuple(options.overrides)).config
    model = GPT(build(config.model, "model"), config.seed)
    # As all optimizers of several workers do: what it remembers is nobody's state.
    require_equal_parameters(list(model.named_parameters()), None, UNEQUAL)
    cases = {GRADIENT: partial(measure_gradient, config, model)}
    for name, how in METHODS.items():
        own = compose((*options.overrides, *how)).config
        cases[name] = partial(measure_optimizer, partial(build_optimizer, own, model), model)
    # Last, since these steps are local, and the workers part.
    for name, new in ((ADAMW, torch.optim.AdamW), (MUON, torch.optim.Muon)):
        module = model.blocks[0] if name == MUON else model
        cases[name] = partial(measure_optimizer, partial(new, [*module.parameters()]), module)
    facts = {
        "torch": torch.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "workers": workers.count,
        "threads": torch.get_num_threads(),
        "parameters": model.config.parameter_count,
        "largest_layer": max(parameter.numel() for parameter in model.parameters()),
        "blocks": model.config.layers,
        "context": model.config.context,
        "steps": options.steps,
        "overrides": options.overrides,
    }
    for method, measure_phases in cases.items():
        start = time.perf_counter()
        of_ranks = workers.gather(measure_phases(workers, options.steps))
        workers.say(f"{method}: measured in {time.perf_counter() - start:.0f} s")
        for rank, measured in enumerate(of_ranks):
            for phase, numbers in measured.items():
                yield {"method": method, "phase": phase, "rank": rank} | numbers | facts


def measure_sharded(options: argparse.Namespace, workers: Workers) -> list[dict]:
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
        "peak_bytes": max(memory.peak_bytes for memory in again.phases.values()),
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
    script = f"scripts/step124m/run.py --steps={facts['steps']}"
    overrides = shlex.join(modern_overrides(facts["overrides"]))
    return f"""# Time and memory of a step

`torchrun --standalone --nproc_per_node={facts["workers"]} {script} {overrides}`

{facts["workers"]} workers, threads each: {facts["threads"]}; {facts["processor"]}, cores in all:
{facts["cores"]}, shared with other programs; torch {facts["torch"]}. The model has
{facts["parameters"]:,} parameters, its largest layer {facts["largest_layer"]:,}. A worker's
gradient is of one sequence of {facts["context"]} tokens, and every method steps with the same
gradients. What was measured on each rank is in [step124m.jsonl](step124m.jsonl).

## Phases

Seconds are the least of {facts["steps"]} steps, on the slower rank; of the exchange on the one that
waits less. Peak is the most that torch's allocator has handed out, in MB beyond what is there
before the step (parameters, and of optimizers gradients and state): temporaries, and what earlier
phases leave for later ones, as messages. Largest is the largest single tensor, those inside of
operators included, in MB and in float32 copies of the largest layer, with the operator that asked
for it. Both are of the rank where they are larger. What MKL and gloo allocate themselves is not in
them.

{phase_table(records)}

## Whole steps

State: bytes per parameter that stay allocated after the first step, beyond parameters and
gradients. EF21-Muon keeps 8 on every rank, M_j and G_j, and 4 in all ranks together, G; where
messages to the workers are compressed, another 4 in all, X. Servers are placed so that their LMOs
take equally long, and no layer is split, so that ranks differ. torch's optimizers step alone, with
this worker's gradients; `torch.optim.Muon` steps one block of {facts["blocks"]}, and its time is
multiplied. It does not take embeddings.

{step_table(records)}
"""


def by_method(records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The records of all ranks, by method and phase."""
    grouped = {}
    for record in records:
        phases = grouped.setdefault(record["method"], {})
        phases.setdefault(record["phase"], []).append(record)
    return grouped


def seconds(of_ranks: list[dict]) -> float:
    """Of a phase: a rank's time in the exchange is also that of waiting for others."""
    which = min if of_ranks[0]["phase"] == "exchange" else max
    return which(record["seconds"] for record in of_ranks)


def phase_table(records: list[dict]) -> str:
    rows = [["method", "phase", "largest is of", "s", "peak MB", "largest MB", "layers"]]
    for method, phases in by_method(records).items():
        phases.pop("state", None)
        for phase, of_ranks in phases.items():
            largest = max(of_ranks, key=lambda record: record["largest_bytes"])
            size, peak = largest["largest_bytes"], max(one["peak_bytes"] for one in of_ranks)
            texts = [method, phase.replace("_", ", "), f"`{largest['largest_operator']}`"]
            numbers = [f"{seconds(of_ranks):.2f}", f"{peak / 1e6:.0f}", f"{size / 1e6:.0f}"]
            rows.append([*texts, *numbers, f"{size / 4 / largest['largest_layer']:.2f}"])
    return markdown(rows, text_columns=3)


def step_table(records: list[dict]) -> str:
    facts = records[0]
    ranks = [f"state, rank {rank}" for rank in range(facts["workers"])]
    rows = [["method", "s without the exchange", "exchange", *ranks, "mean"]]
    for method, phases in by_method(records).items():
        if method == GRADIENT:
            continue
        states = [one["state_bytes"] / one["of_parameters"] for one in phases.pop("state")]
        exchange = f"{seconds(phases.pop('exchange')):.2f}" if "exchange" in phases else "none"
        total = sum(map(seconds, phases.values()))
        if method == MUON:
            method, total = f"{method}, times {facts['blocks']}", facts["blocks"] * total
        numbers = (f"{number:.2f}" for number in (*states, mean(states)))
        rows.append([method, f"{total:.2f}", exchange, *numbers])
    return markdown(rows)


def sharded_report(records: list[dict]) -> str:
    facts = records[0]
    heading = ["held, MB", "of it state", "share of the whole", "bound, MB", "step, MB beyond"]
    rows = [["rank", *heading]]
    for one in records:
        held, state, bound, peak = (
            f"{one[name] / 1e6:.0f}"
            for name in ("kept_bytes", "state_bytes", "bound_bytes", "peak_bytes")
        )
        share = f"{one['kept_bytes'] / one['whole_bytes']:.2f}"
        rows.append([str(one["rank"]), held, state, share, bound, peak])
    launch = f"--nproc_per_node={len(records)} scripts/step124m/run.py --sharded"
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    study = LOG, by_ranks(measure_all), page(report)
    if "--sharded" in sys.argv:
        study = SHARDED_LOG, by_ranks(measure_sharded), page(sharded_report, "sharded.md")
    return command(__doc__, *study, OPTIONS)


if __name__ == "__main__":
    exit_process(main())
