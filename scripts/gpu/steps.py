"""Where time and memory of a step go on one GPU, with most compressors, beside torch's optimizers.

    python scripts/gpu/steps.py model=gpt2-124m

KEY=VALUE are Hydra overrides, as of train.py. One worker alone: nothing is sent, all else is done.
Phases are timed by events on the device; whether a step makes the host wait is asked of torch
(`torch.cuda.set_sync_debug_mode`). On a machine without a GPU the same is done by its processor.
Writes steps.jsonl into `--out`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ef21_muon.checks.guards import PhaseTimer
from model import GPT
from scripts.gpu.run import step_table
from scripts.studies import OVERRIDES, command
from training.config import CONFIGS, build, compose
from training.method import build_optimizer

LOG = Path("runs", "gpu", "steps.jsonl")
OPTIONS = {**OVERRIDES, "--steps": {"type": int, "default": 10, "help": "timed steps"}}
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")
WARM_UP = 3  # steps, in which what is compiled is
FORWARD, ADAMW, MUON = "forward and backward", "torch.optim.AdamW", "torch.optim.Muon, blocks"
COMPRESSORS = sorted(path.stem for path in (CONFIGS / "compressor").glob("*.yaml"))
# Not those of others in one, nor the exact SVD.
METHODS = {
    name: [f"compressor@w2s={name}"]
    for name in COMPRESSORS
    if name not in ("scaled", "bernoulli", "top_singular")
} | {"rank, both ways": ["compressor@w2s=rank", "compressor@s2w=rank"]}


def measure(step: Callable, timer: PhaseTimer, steps: int) -> dict:
    """Milliseconds of a step and its phases (medians), peak bytes and what makes the host wait.

    Without a GPU nobody counts bytes, and nothing waits.
    """
    for _ in range(WARM_UP):
        step()
    waits, peak = (wait(step), peak_bytes(step)) if ON_GPU else (None, 0)
    seconds, phases = [], []
    for _ in range(steps):
        timer.read()
        start = settled()
        step()
        seconds.append(settled() - start)
        phases.append(timer.read())
    medians = {phase: median(one[phase] for one in phases) for phase in phases[0]}
    return {
        "ms": round(1000 * median(seconds), 3),
        "phases_ms": {phase: round(1000 * one, 3) for phase, one in medians.items()},
        "peak_bytes": peak,
        "waits": waits,
    }


def settled() -> float:
    """The time at which the device has done all that it was given."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(step: Callable) -> int:
    """The most that a step allocates beyond what there is before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def wait(step: Callable) -> str | None:
    """What in a step makes the host wait for the device, as torch says it; None if nothing."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def measure_method(new: Callable, put_back: Callable, steps: int) -> dict:
    """An optimizer's step with the gradients that are there, and the state that it keeps."""
    before = torch.cuda.memory_allocated()  # 0 without a GPU
    optimizer = new()
    timer = getattr(optimizer, "timer", PhaseTimer(DEVICE))
    put_back()
    numbers = measure(optimizer.step, timer, steps)
    return numbers | {"state_bytes": torch.cuda.memory_allocated() - before}


def measure_all(options: argparse.Namespace) -> Iterator[dict]:
    """The records of all methods."""
    config = compose(tuple(options.overrides)).config
    model = GPT(build(config.model, "model"), config.seed).to(DEVICE)
    compiled = torch.compile(model) if ON_GPU else model
    shape = config.batch.micro_size, model.config.context
    tokens = torch.randint(model.config.vocab_size, (2, *shape), device=DEVICE)
    timer = PhaseTimer(DEVICE)

    def forward_backward() -> None:
        model.zero_grad()
        with timer("forward_backward"):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
                loss = compiled(*tokens)
            loss.backward()

    measured = measure(forward_backward, timer, options.steps)
    yield {"record": "step", "method": FORWARD, **measured, "tokens": tokens[0].numel()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizers = {
        ADAMW: lambda: torch.optim.AdamW(model.parameters(), fused=ON_GPU),
        MUON: lambda: torch.optim.Muon(model.blocks.parameters()),
    }
    for name, how in METHODS.items():
        own = compose((*options.overrides, *how)).config
        optimizers[name] = lambda own=own: build_optimizer(own, model)

    @torch.no_grad()
    def put_back() -> None:
        for parameter, gradient, value in zip(model.parameters(), gradients, start, strict=True):
            parameter.grad = gradient
            parameter.copy_(value)

    for name, new in optimizers.items():
        measured = measure_method(new, put_back, options.steps)
        yield {"record": "step", "method": name} | measured


if __name__ == "__main__":
    sys.exit(command(__doc__, LOG, measure_all, lambda records, _: step_table(records), OPTIONS))
