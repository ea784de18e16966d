"""Where time and memory of a step go on CPU workers, beside torch's AdamW and Muon.

    torchrun --standalone --nproc_per_node=2 scripts/bench_step.py model=gpt2-124m

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
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import DictConfig
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from data.loader import WorkerBatches
from ef21_muon.checks import require_equal_parameters
from ef21_muon.timing import PhaseTimer
from model import GPT
from scripts.bench_codec import processor
from train import open_data
from training.config import ROOT, build, compose
from training.method import build_optimizer
from training.workers import RunError, Workers, leave

OUTPUT = ROOT / "results" / "step124m"
RANK = ["compressor@w2s=rank", "w2s.fraction=0.15"]
METHODS = {
    "identity": ["compressor@w2s=identity"],
    "rank 15% natural": RANK,
    "top 15% natural": ["compressor@w2s=topk", "w2s.fraction=0.15"],
    "rank 15% natural both ways": [*RANK, "compressor@s2w=rank", "s2w.fraction=0.15"],
}
GRADIENT = "gradient"
ADAMW, MUON = "`torch.optim.AdamW`", "`torch.optim.Muon`, one block"


class Phases(PhaseTimer):
    """A timer whose phases are also told to the profiler."""

    @contextmanager
    def __call__(self, phase: str):
        with record_function(phase), super().__call__(phase):
            yield


@dataclass
class Memory:
    """Bytes beyond those that were allocated before: at most, and of the largest tensor."""

    peak: int = 0
    largest: int = 0
    operator: str = ""  # that allocated the largest


class Allocations:
    """What torch's CPU allocator hands out `with` it, by phase.

    `phases`: Memory of each; `kept`: bytes that are still allocated at the end.
    """

    def __enter__(self):
        self.profile = profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True
        ).__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "trace.json")
            self.profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        del self.profile
        marks = [event for event in events if event.get("cat") == "user_annotation"]
        operators = [event for event in events if event.get("cat") == "cpu_op"]
        changes = sorted(
            (event for event in events if event["name"] == "[memory]"),
            key=lambda event: event["ts"],
        )
        self.phases = {mark["name"]: Memory() for mark in marks}
        live, level = {}, 0
        for change in changes:
            address, size = change["args"]["Addr"], change["args"]["Bytes"]
            # Of what was allocated before, the profiler may or may not know the size.
            before, level = level, level + (size if size > 0 else -live.pop(address, 0))
            if size > 0:
                live[address] = size
            for mark in enclosing(change, marks):
                memory = self.phases[mark["name"]]
                memory.peak = max(memory.peak, before, level)
                if size > memory.largest:
                    memory.largest, memory.operator = size, told(change, operators)
        self.kept = level


def enclosing(event: dict, others: list[dict]) -> Iterator[dict]:
    """Those of the other events during which an event happened."""
    return (o for o in others if o["ts"] <= event["ts"] <= o["ts"] + o["dur"])


def told(event: dict, operators: list[dict]) -> str:
    """The outermost operator during which an event happened, and the shapes of its inputs."""
    outermost = max(enclosing(event, operators), key=lambda o: o["dur"], default=None)
    if outermost is None:
        return "none"
    shapes = (
        "x".join(map(str, shape)) for shape in outermost["args"].get("Input Dims", []) if shape
    )
    return f"{outermost['name'].removeprefix('aten::')}({', '.join(shapes)})"


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
    require_equal_parameters(list(model.named_parameters()), workers.count, None)
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


def report(records: list[dict], options: argparse.Namespace) -> str:
    """README.md."""
    facts = records[0]
    launch = "torchrun", "--standalone", f"--nproc_per_node={facts['workers']}"
    script = "scripts/bench_step.py", f"--steps={options.steps}"
    command = shlex.join([*launch, *script, *options.overrides])
    return f"""# Time and memory of a step

`{command}`

{facts["workers"]} workers, threads each: {facts["threads"]}; {facts["processor"]}, cores in all:
{facts["cores"]}, shared with other programs; torch {facts["torch"]}. The model has
{facts["parameters"]:,} parameters, its largest layer {facts["largest_layer"]:,}. A worker's
gradient is of one sequence of {facts["context"]} tokens, and every method steps with the same
gradients. What was measured on each rank is in [{log_name(options)}]({log_name(options)}).

## Phases

Seconds are the least of {options.steps} steps, on the slower rank; of the exchange on the one that
waits less. Peak is the most that torch's allocator has handed out, in MB beyond what is there
before the step (parameters, and of optimizers gradients and state): temporaries, and what earlier
phases leave for later ones, as messages. Largest is the largest single tensor, those inside of
operators included, in MB and in float32 copies of the largest layer, with the operator that asked
for it. Both are of the rank where they are larger. What MKL and gloo allocate themselves is not in
them.

{phase_table(records)}

## Whole steps

State: bytes a parameter that stay allocated after the first step, beyond parameters and gradients.
EF21-Muon keeps 8 on every rank, M_j and G_j, and 4 in all ranks together, G; where messages to the
workers are compressed, another 4 in all, X. Servers are placed so that their LMOs take equally
long, and no layer is split, so that ranks differ. torch's optimizers step alone, with this worker's
gradients; `torch.optim.Muon` steps one block of {facts["blocks"]}, and its time is multiplied. It
does not take embeddings.

{step_table(records)}
"""


def log_name(options: argparse.Namespace) -> str:
    return f"{options.out.resolve().name}.jsonl"


def table(rows: list[list[str]], text_columns: int) -> str:
    heading, *body = rows
    rule = ["---"] * text_columns + ["---:"] * (len(heading) - text_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *body))


def by_phase(records: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The records of all ranks, by method and phase."""
    grouped = {}
    for record in records:
        grouped.setdefault((record["method"], record["phase"]), []).append(record)
    return grouped


def seconds(of_ranks: list[dict]) -> float:
    """Of a phase: a rank's time in the exchange is also that of waiting for others."""
    which = min if of_ranks[0]["phase"] == "exchange" else max
    return which(record["seconds"] for record in of_ranks)


def phase_table(records: list[dict]) -> str:
    rows = [["method", "phase", "largest is of", "s", "peak MB", "largest MB", "layers"]]
    for (method, phase), of_ranks in by_phase(records).items():
        if phase == "state":
            continue
        largest = max(of_ranks, key=lambda record: record["largest_bytes"])
        rows.append(
            [
                method,
                phase.replace("_", ", "),
                f"`{largest['largest_operator']}`",
                f"{seconds(of_ranks):.2f}",
                f"{max(record['peak_bytes'] for record in of_ranks) / 1e6:.0f}",
                f"{largest['largest_bytes'] / 1e6:.0f}",
                f"{largest['largest_bytes'] / 4 / largest['largest_layer']:.2f}",
            ]
        )
    return table(rows, text_columns=3)


def step_table(records: list[dict]) -> str:
    grouped, blocks = by_phase(records), records[0]["blocks"]
    ranks = [f"state, rank {record['rank']}" for record in grouped[GRADIENT, "forward_backward"]]
    rows = [["method", "s without the exchange", "exchange", *ranks, "mean"]]
    for (method, phase), states in grouped.items():
        if phase != "state":
            continue
        of_phases = {phase: seconds(of) for (name, phase), of in grouped.items()
                     if name == method and phase != "state"}  # fmt: skip
        exchange = of_phases.pop("exchange", None)
        total, name = sum(of_phases.values()), method
        if method == MUON:
            total, name = blocks * total, f"{method}, times {blocks}"
        state = [record["state_bytes"] / record["of_parameters"] for record in states]
        rows.append(
            [
                name,
                f"{total:.2f}",
                "none" if exchange is None else f"{exchange:.2f}",
                *(f"{number:.2f}" for number in (*state, sum(state) / len(state))),
            ]
        )
    return table(rows, text_columns=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts and stops
    workers = Workers()
    return workers.finish(lambda: job(options, workers))


if __name__ == "__main__":
    leave(main())
