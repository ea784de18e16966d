"""Where time and memory of a step go on one GPU, with most compressors, beside torch's optimizers.

    python scripts/gpu/steps.py --out records.jsonl model=gpt2-124m

KEY=VALUE are Hydra overrides, as of train.py. One worker alone: nothing is sent, all else is done.
Phases are timed by events on the device; whether a step makes the host wait is asked of torch
(`torch.cuda.set_sync_debug_mode`). On a machine without a GPU the same is done by its processor.
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
from scripts.studies import write_records
from training.config import CONFIGS, build, compose
from training.method import build_optimizer

WARM_UP = 3  # steps, in which what is compiled is
FORWARD, ADAMW, MUON = "forward and backward", "torch.optim.AdamW", "torch.optim.Muon, blocks"
COMPRESSORS = sorted(path.stem for path in (CONFIGS / "compressor").glob("*.yaml"))
# Not those of others in one, nor the exact SVD.
METHODS = {
    name: [f"compressor@w2s={name}"]
    for name in COMPRESSORS
    if name not in ("scaled", "bernoulli", "top_singular")
} | {"rank, both ways": ["compressor@w2s=rank", "compressor@s2w=rank"]}


class Device:
    """The GPU, or without one the processor."""

    def __init__(self):
        self.on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.on_cuda else torch.device("cpu")

    def allocated(self) -> int:
        """Bytes; without a GPU nobody counts."""
        return torch.cuda.memory_allocated() if self.on_cuda else 0

    def settle(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def peak(self, step: Callable) -> int:
        """The most bytes that a step allocates beyond what there is before it."""
        if not self.on_cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = self.allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    def wait(self, step: Callable) -> str | None:
        """What in a step makes the host wait for the device, as torch says it; None if nothing."""
        if not self.on_cuda:
            return None
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None


def measure(device: Device, step: Callable, timer: PhaseTimer, steps: int) -> dict:
    """Milliseconds of a step and its phases (medians), peak bytes and what makes the host wait."""
    for _ in range(WARM_UP):
        step()
    waits = device.wait(step)
    peak = device.peak(step)
    seconds, phases = [], []
    for _ in range(steps):
        timer.read()
        device.settle()
        start = time.perf_counter()
        step()
        device.settle()
        seconds.append(time.perf_counter() - start)
        phases.append(timer.read())
    medians = {phase: median(one[phase] for one in phases) for phase in phases[0]}
    return {
        "ms": round(1000 * median(seconds), 3),
        "phases_ms": {phase: round(1000 * one, 3) for phase, one in medians.items()},
        "peak_bytes": peak,
        "waits": waits,
    }


def measure_method(device: Device, new: Callable, put_back: Callable, steps: int) -> dict:
    """An optimizer's step with the gradients that are there, and the state that it keeps."""
    before = device.allocated()
    optimizer = new()
    timer = getattr(optimizer, "timer", PhaseTimer(device.device))
    put_back()
    numbers = measure(device, optimizer.step, timer, steps)
    return numbers | {"state_bytes": device.allocated() - before}


def measure_all(options: argparse.Namespace) -> Iterator[dict]:
    """The records of all methods."""
    config, device = compose(tuple(options.overrides)).config, Device()
    model = GPT(build(config.model, "model"), config.seed).to(device.device)
    compiled = torch.compile(model) if device.on_cuda else model
    shape = config.batch.micro_size, model.config.context
    tokens = torch.randint(model.config.vocab_size, (2, *shape), device=device.device)
    timer = PhaseTimer(device.device)

    def forward_backward() -> None:
        model.zero_grad()
        with timer("forward_backward"):
            with torch.autocast(device.device.type, torch.bfloat16, enabled=device.on_cuda):
                loss = compiled(*tokens)
            loss.backward()

    measured = measure(device, forward_backward, timer, options.steps)
    yield {"method": FORWARD, **measured, "tokens": tokens[0].numel()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizers = {
        ADAMW: lambda: torch.optim.AdamW(model.parameters(), fused=device.on_cuda),
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
        yield {"method": name} | measure_method(device, new, put_back, options.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="file for the records")
    options = parser.parse_intermixed_args()
    records = ({"record": "step"} | record for record in measure_all(options))
    write_records(options.out, map(shown, records))


def shown(record: dict) -> dict:
    print(f"{record['method']}: {record['ms']:.1f} ms {record['phases_ms']}", flush=True)
    return record


if __name__ == "__main__":
    main()
