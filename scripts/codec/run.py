"""Measure every compressor on the message of one worker: time, bytes, error and memory.

    python scripts/codec/run.py [--out DIR] [--quick] [--redraw] [KEY=VALUE ...]

One thread encodes and decodes the whole model in the batches of equal shapes that the optimizer
makes. The inputs are a momentum difference M_j - G_j, taken from a short training run that
KEY=VALUE configures (Hydra overrides, as of train.py), and Gaussian noise of the same shapes. The
records go to codec.jsonl in DIR, and from them come README.md, codec.png and codec.svg. Linux only.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.loader import WorkerBatches
from ef21_muon.compressors.base import Compressor, Identity, Quantize
from ef21_muon.compressors.low_rank import QuantizedRank, RankK
from ef21_muon.compressors.sparse import RandK, TopK
from model import GPT
from scripts.measuring import processor
from training.config import ROOT, build, compose
from training.data import open_data
from training.drawing import Figure, Line2D, LogLocator, NullLocator, matplotlib
from training.method import build_optimizer
from training.picture import COLOURS, STYLE, save
from training.renamed import modern_label
from training.workers import RunError

COMMAND = ("python", "scripts/codec/run.py")
DEFAULTS = ("model=gpt2-124m", "model.context=256", "batch.global_size=2", "steps=5")
REPEATS = 2
INPUTS = {"momentum": "momentum difference", "noise": "Gaussian noise"}
DENSE = ("bfloat16", "natural", "natural4", "natural3", "int8", "int4", "int2")
DENSE += ("normal4", "normal2", "sign")
SPARSE = ("natural", "natural4", "int4@128")
LOW_RANK = ("natural", "natural4", "int4")
COMPRESSORS = (
    Identity(),
    *(Quantize(values) for values in DENSE),
    *(TopK(fraction, values) for fraction in (0.15, 0.05) for values in SPARSE),
    RandK(0.15, "natural"),
    RankK(0.15, "float32"),
    *(RankK(fraction, values) for fraction in (0.15, 0.1, 0.05) for values in LOW_RANK),
    RankK(0.15, "int3"),
    *(QuantizedRank(fraction) for fraction in (0.15, 0.1, 0.05)),
)
FAMILIES = {"quantize": "#000000", "top": COLOURS[1], "random": COLOURS[2], "rank": COLOURS[0]}
FAMILIES["quantized rank"] = COLOURS[3]
SHORT = ("identity", "natural", "sign")  # names of their own in the family of quantize
MARKERS = "osDP^v>X<dh*p"  # of the value formats
LEAST_DRAWN = 1e-5  # of 1 - alpha


def momentum_difference(config: DictConfig) -> list[Tensor]:
    """M_j - G_j of a worker that trains alone, as its message of round `config.steps` + 1 has it.

    float32 (L, m, n) for every batch of the optimizer.
    """
    model = GPT(build(config.model, "model"), config.seed)
    optimizer = build_optimizer(config, model)
    tokens, _ = open_data(config)
    windows = WorkerBatches(tokens, config.model.context, 0, 1, config.seed)
    for _ in range(config.steps):
        model(*windows.next(config.batch.global_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model(*windows.next(config.batch.global_size)).backward()
    differences = []
    for batch in optimizer.batches:
        gradient = torch.stack(batch.matrices(parameter.grad for parameter in batch.params))
        beta = 1 - optimizer.param_groups[batch.group]["momentum"]
        differences.append(batch.state["momentum"].lerp(gradient, beta) - batch.up.buffer)
    return differences


def measure(compressor: Compressor, batches: Sequence[Tensor], repeats: int) -> dict:
    """Encode and decode float32 batches (L, m, n); the fields that a codec record has of it.

    Seconds are those of the whole model, for each batch the best of `repeats`. Alphas are
    1 - ||C(x) - x||^2 / ||x||^2, of all layers together and their mean.
    """
    generator = torch.Generator().manual_seed(0)
    encode_total, decode_total, payload_bytes, errors, norms = 0.0, 0.0, 0, [], []
    for x in batches:
        fitted = compressor.fit(*x.shape[1:])
        encode_seconds, decode_seconds = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            payload = fitted.encode(x, generator)
            encode_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            decoded = fitted.decode(payload, *x.shape[1:])
            decode_seconds.append(time.perf_counter() - start)
        encode_total += min(encode_seconds)
        decode_total += min(decode_seconds)
        payload_bytes += payload.numel()
        norms.append(squared_norms(x))
        errors.append(squared_norms(decoded - x))
    errors, norms = torch.cat(errors), torch.cat(norms)
    bits = 8 * payload_bytes / sum(x.numel() for x in batches)
    return {
        "encode_seconds": encode_total,
        "decode_seconds": decode_total,
        "payload_bytes": payload_bytes,
        "bits_per_parameter": bits,
        "alpha": float(1 - errors.sum() / norms.sum()),
        "alpha_layer_mean": float((1 - errors / norms).mean()),
        "alpha_bound": shannon_alpha(bits),
    }


def squared_norms(x: Tensor) -> Tensor:
    """Of every matrix of (L, m, n), float64 (L,)."""
    return torch.stack([matrix.double().square().sum() for matrix in x])


def shannon_alpha(bits_per_parameter: float) -> float:
    """The largest alpha that any code reaches on Gaussian noise: 1 - 2^(-2 R)."""
    return 1 - 4.0**-bits_per_parameter


def extra_memory(compressor: Compressor, shapes: Sequence[torch.Size]) -> int:
    """How far resident memory rises while a batch is encoded, in bytes, for the worst of `shapes`.

    The message counts, the input does not. To be called in a process of `memory_process`.
    """
    torch.set_num_threads(1)
    compressor.encode(torch.randn(1, 64, 64))  # loads what is loaded once
    worst = 0
    for shape in shapes:
        x = torch.randn(shape)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        before = peak_memory()
        compressor.fit(*shape[1:]).encode(x)
        worst = max(worst, peak_memory() - before)
    return worst


def peak_memory() -> int:
    """The most memory that was resident, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@contextmanager
def memory_process() -> Iterator[ProcessPoolExecutor]:
    """A process in which freed tensors leave resident memory at once: glibc keeps none of them."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        yield process
    del os.environ["MALLOC_MMAP_THRESHOLD_"]


def run_records(config: DictConfig, command: str, repeats: int) -> Iterator[dict]:
    """Yield the run record, then a codec record for every compressor and input."""
    torch.set_num_threads(1)
    differences = momentum_difference(config)
    yield {
        "record": "run",
        "schema": 1,
        "command": command,
        "parameters": sum(x.numel() for x in differences),
        "layers": sum(len(x) for x in differences),
        "largest_layer_bytes": 4 * max(x[0].numel() for x in differences),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "repeats": repeats,
        "rounds": config.steps,
        "sequences": config.batch.global_size,
        "context": config.model.context,
        "data": config.data.name,
        "w2s": str(build(config.w2s, "w2s")),
    }
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator) for x in differences]
    with memory_process() as process:
        for compressor in COMPRESSORS:
            name, values = str(compressor), str(compressor.values)
            what = {"record": "codec", "compressor": name, "values": values}
            what["family"] = family_of(name)
            extra = process.submit(extra_memory, compressor, [x.shape for x in noise]).result()
            for kind, batches in zip(INPUTS, (differences, noise), strict=True):
                measured = measure(compressor, batches, repeats)
                yield what | {"input": kind, **measured, "extra_bytes": extra}


def family_of(name: str) -> str:
    """A compressor's family, by its name."""
    first = name.split()[0]
    return "quantize" if first in SHORT else first.replace("quantized", "quantized rank")


def read(log: Path) -> list[dict]:
    """The records of a log of any version, with today's names of compressors."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        for key in {"compressor", "w2s"} & record.keys():
            record[key] = modern_label(record[key])
        if "compressor" in record:
            record["family"] = family_of(record["compressor"])
    return records


def table(records: Sequence[dict]) -> str:
    """The measurements in Markdown, a compressor per line; times are those of the momentum."""
    run, measured = records[0], records[1:]
    lines = [
        "| compressor | bits per parameter | encode s | decode s | extra memory "
        "| alpha, momentum | mean of layers | alpha, noise | Shannon bound |",
        "| --- |" + 8 * " ---: |",
    ]
    for momentum, noise in zip(measured[::2], measured[1::2], strict=True):
        cells = [
            momentum["compressor"],
            f"{momentum['bits_per_parameter']:.3f}",
            *(f"{momentum[seconds]:.2f}" for seconds in ("encode_seconds", "decode_seconds")),
            f"{momentum['extra_bytes'] / run['largest_layer_bytes']:.2f}",
            *(f"{momentum[alpha]:.4f}" for alpha in ("alpha", "alpha_layer_mean")),
            *(f"{noise[alpha]:.4f}" for alpha in ("alpha", "alpha_bound")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(records: Sequence[dict]) -> str:
    """README.md: how it was measured, and the table."""
    run = records[0]
    # Where the script lies today; a log may have an earlier path of it.
    command = shlex.join([*COMMAND, *shlex.split(run["command"])[len(COMMAND) :]])
    return f"""# What the compressors cost

`{command}`: one thread on {run["processor"]}, {run["cores"]} cores, torch
{run["torch"]}. One worker's message for {run["parameters"]:,} parameters in {run["layers"]} layers.

![Error against bits per parameter](codec.png)

{table(records)}

Seconds: the whole model, the best of {run["repeats"]} for each batch of equal layers, on the
momentum difference. Extra memory: the most that resident memory rises while a batch is encoded,
message included, as a multiple of the largest layer's size
({run["largest_layer_bytes"] / 1e6:.1f} MB in float32). Alpha: 1 - ||C(x) - x||^2 / ||x||^2 of
the whole model, and the mean of its layers.

The momentum difference M_j - G_j is that of a worker alone, after {run["rounds"]} rounds of
{run["sequences"]} x {run["context"]} tokens from {run["data"]} with {run["w2s"]} to the server.
The noise is Gaussian, and on it no code of R bits per parameter has an alpha above 1 - 2^(-2R), the
Shannon bound; the momentum difference has structure and is not bound by it. The picture leaves out
what loses less than {LEAST_DRAWN:g}.

What more blocks and a diagonal geometry save: [blocks.md](blocks.md).
"""


def build_figure(records: Sequence[dict]) -> Figure:
    """1 - alpha against bits per parameter, a panel for each input, and the bound.

    Messages of one family and value format are joined. What loses next to nothing is left out.
    """
    drawn = [record for record in records[1:] if 1 - record["alpha"] > LEAST_DRAWN]
    markers = dict(zip(dict.fromkeys(r["values"] for r in drawn), MARKERS, strict=False))
    bound = {"color": "#777777", "linestyle": "--"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.5), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (kind, title) in zip(panels, INPUTS.items(), strict=True):
            rows = [record for record in drawn if record["input"] == kind]
            for family, values in dict.fromkeys((r["family"], r["values"]) for r in rows):
                joined = [r for r in rows if (r["family"], r["values"]) == (family, values)]
                points = [(r["bits_per_parameter"], 1 - r["alpha"]) for r in joined]
                look = {"color": FAMILIES[family], "marker": markers[values], "linewidth": 0.6}
                axes.plot(*zip(*points, strict=True), **look)
            bits = [2 ** (step / 20) for step in range(-40, 61)]
            axes.plot(bits, [1 - shannon_alpha(rate) for rate in bits], **bound)
            axes.set(title=title, xlabel="bits per parameter", xscale="log", yscale="log")
        panels[0].set_ylabel("1 - alpha")
        panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].xaxis.set_minor_locator(NullLocator())
        panels[0].xaxis.set_major_formatter("{x:g}")
        families = dict.fromkeys(record["family"] for record in drawn)
        handles = [Line2D([], [], color=FAMILIES[name], label=name) for name in families]
        look = {"color": "#777777", "linestyle": ""}
        handles += [Line2D([], [], marker=markers[name], label=name, **look) for name in markers]
        handles.append(Line2D([], [], label="$2^{-2R}$, Shannon", **bound))
        figure.legend(handles=handles, loc="outside right center")
    return figure


def draw(records: Sequence[dict], directory: Path) -> None:
    """Write README.md, codec.png and codec.svg, which follow from the records alone."""
    (directory / "README.md").write_text(report(records))
    save(build_figure(records), directory / "codec")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the training run")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "codec")
    parser.add_argument("--quick", action="store_true", help=f"measure once, not best of {REPEATS}")
    parser.add_argument("--redraw", action="store_true", help="from DIR/codec.jsonl, no measuring")
    options = parser.parse_intermixed_args(arguments)
    log = options.out / "codec.jsonl"
    try:
        if not options.redraw:
            config = compose((*DEFAULTS, *options.overrides)).config
            command = shlex.join([*COMMAND, *arguments])
            options.out.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                for record in run_records(config, command, 1 if options.quick else REPEATS):
                    file.write(json.dumps(record) + "\n")
                    file.flush()
        records = read(log)
        draw(records, options.out)
    except (RunError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
