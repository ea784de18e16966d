"""Where time and memory of a step go on CPU workers, beside torch's AdamW and Muon.

    torchrun --standalone --nproc_per_node=2 scripts/step124m/run.py model=gpt2-124m

KEY=VALUE are Hydra overrides, as of train.py. Every worker takes the gradient of one sequence and
steps with it, again and again, for every method. Seconds are the least of `--steps` steps; memory
is what torch's allocator handed out in one more step, temporaries inside of operators included, as
torch.profiler records it. torch.optim.Muon steps a single block, since its bfloat16 takes minutes
for all of them on CPUs that lack it; the table multiplies. The records go to the folder `--out`,
and from them comes README.md.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from omegaconf import DictConfig
from torch import nn

from data.loader import WorkerBatches
from ef21_muon.checks.guards import PhaseTimer
from ef21_muon.transport.agreement import UNEQUAL, require_equal_parameters
from model import GPT
from scripts.measuring import processor
from scripts.step124m.allocations import Allocations, Phases
from scripts.step124m.report import ADAMW, GRADIENT, MUON, log_name, report
from training.config import ROOT, build, compose
from training.data import open_data
from training.method import build_optimizer
from training.workers import RunError, Workers, exit_process

OUTPUT = ROOT / "results" / "step124m"
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
        phase: {
            "seconds": round(min(seconds[phase] for seconds in times), 4),
            "peak_bytes": memory.peak,
            "largest_bytes": memory.largest,
            "largest_operator": memory.operator,
        }
        for phase, memory in allocations.phases.items()
        if phase in times[0]
    }


def measure_state(parameters, build_and_step: Callable) -> tuple[object, dict]:
    """An optimizer after its first step, and what it keeps beyond parameters and gradients."""
    with Allocations() as allocations:
        optimizer = build_and_step()
    count = sum(parameter.numel() for parameter in parameters)
    return optimizer, {"state": {"state_bytes": allocations.kept, "of_parameters": count}}


def measure_gradient(config: DictConfig, model: GPT, workers: Workers, steps: int) -> dict:
    """Forward and backward of one sequence of this worker; its gradients stay in the model."""
    tokens, _ = open_data(config)
    context = model.config.context
    batches = WorkerBatches(tokens, context, workers.rank, workers.count, config.seed)
    inputs, targets = batches.next(1)
    timer = Phases()

    def step() -> None:
        model.zero_grad()
        with timer("forward_backward"):
            model(inputs, targets).backward()

    return measure(workers, timer, steps, step)


def measure_method(config: DictConfig, model: GPT, workers: Workers, steps: int) -> dict:
    """EF21-Muon's step with the model's gradients."""

    def build_and_step() -> torch.optim.Optimizer:
        optimizer = build_optimizer(config, model)
        optimizer.timer = Phases()
        optimizer.step()
        return optimizer

    optimizer, state = measure_state(model.parameters(), build_and_step)
    return state | measure(workers, optimizer.timer, steps, optimizer.step)


def measure_torch(
    kind: type[torch.optim.Optimizer], module: nn.Module, workers: Workers, steps: int
) -> dict:
    """The step of one of torch's optimizers with a module's gradients, of this worker alone."""
    timer = Phases()

    def build_and_step() -> torch.optim.Optimizer:
        optimizer = kind(module.parameters())
        optimizer.step()
        return optimizer

    optimizer, state = measure_state(module.parameters(), build_and_step)

    def step() -> None:
        with timer("step"):
            optimizer.step()

    return state | measure(workers, timer, steps, step)


def measure_all(options: argparse.Namespace, workers: Workers) -> list[dict]:
    """The records of all ranks, on all of them."""
    config, *configs = (
        compose((*options.overrides, *how)).config for how in ([], *METHODS.values())
    )
    model = GPT(build(config.model, "model"), config.seed)
    # As all optimizers of several workers do: what it remembers is nobody's state.
    require_equal_parameters(list(model.named_parameters()), None, UNEQUAL)
    arguments = workers, options.steps
    measurements = {GRADIENT: lambda: measure_gradient(config, model, *arguments)}
    for name, own in zip(METHODS, configs, strict=True):
        measurements[name] = lambda own=own: measure_method(own, model, *arguments)
    # Last, since these steps are local, and the workers part.
    measurements[ADAMW] = lambda: measure_torch(torch.optim.AdamW, model, *arguments)
    measurements[MUON] = lambda: measure_torch(torch.optim.Muon, model.blocks[0], *arguments)
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
    }
    records = []
    for method, measurement in measurements.items():
        start = time.perf_counter()
        of_ranks = workers.gather(measurement())
        workers.say(f"{method}: measured in {time.perf_counter() - start:.0f} s")
        records += [
            {"method": method, "phase": phase, "rank": rank} | numbers | facts
            for rank, phases in enumerate(of_ranks)
            for phase, numbers in phases.items()
        ]
    return records


def job(options: argparse.Namespace, workers: Workers) -> int:
    """Measure; rank 0 writes the records and README.md."""
    if workers.device.type != "cpu" or workers.count < 2:
        raise RunError(
            f"{workers.count} workers on {workers.device.type} were started: give 2 or more on "
            "the CPU, with torchrun, and with CUDA_VISIBLE_DEVICES= where there is a GPU"
        )
    records = measure_all(options, workers)
    if workers.first:
        options.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (options.out / log_name(options)).write_text(lines)
        text = report(records, options)
        (options.out / "README.md").write_text(text)
        print(text)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--steps", type=int, default=2, help="timed steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder (default %(default)s)")
    parser.add_argument("--redraw", action="store_true", help="README.md from the records alone")
    options = parser.parse_intermixed_args()
    if options.redraw:
        lines = (options.out / log_name(options)).read_text().splitlines()
        records = [json.loads(line) for line in lines]
        (options.out / "README.md").write_text(report(records, options))
        return 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    workers = Workers()
    return workers.run(lambda: job(options, workers))


if __name__ == "__main__":
    exit_process(main())
