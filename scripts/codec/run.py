"""Measure every compressor on the message of one worker: time, bytes, error and memory.

    python scripts/codec/run.py [--out DIR] [--quick] [--redraw] [KEY=VALUE ...]

One thread encodes and decodes the whole model in the batches of equal shapes that the optimizer
makes. The inputs are a momentum difference M_j - G_j, taken from a short training run that
KEY=VALUE configures (Hydra overrides, as of train.py), and Gaussian noise of the same shapes. The
records go to codec.jsonl in DIR, and from them come README.md, codec.png and codec.svg. Linux only.
"""

import argparse
import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.loader import WorkerBatches
from ef21_muon.compressors import Compressor, from_spec
from model import GPT
from scripts.measuring import processor
from scripts.studies import command, fill, markdown, select
from training.config import ROOT, build, compose
from training.data import open_data
from training.drawing import Line2D
from training.method import build_optimizer
from training.picture import COLOURS, panels, plain_sizes

TEXT = Path(__file__).with_name("report.md")
DEFAULTS = ("model=gpt2-124m", "model.context=256", "batch.global_size=2", "steps=5")
REPEATS = 2
INPUTS = {"momentum": "momentum difference", "noise": "Gaussian noise"}
SPECS = [f"quantize:{bits}" for bits in ("bfloat16", "natural", "natural4", "natural3")]
SPECS += [f"quantize:{bits}" for bits in ("int8", "int4", "int2", "normal4", "normal2", "sign")]
SPECS += [f"topk:{k}:{bits}" for k in (0.15, 0.05) for bits in ("natural", "natural4", "int4@128")]
SPECS += ["randk:0.15:natural", "rank:0.15"]
SPECS += [f"rank:{k}:{bits}" for k in (0.15, 0.1, 0.05) for bits in ("natural", "natural4", "int4")]
SPECS += ["rank:0.15:int3", *(f"quantized_rank:{k}" for k in (0.15, 0.1, 0.05))]
COMPRESSORS = tuple(map(from_spec, ["identity", *SPECS]))
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


def fastest(call: Callable, repeats: int) -> tuple[float, Any]:
    """The least seconds of a call, and what it returned at last."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def measured(compressor: Compressor, batches: Sequence[Tensor], repeats: int) -> dict:
    """Encode and decode float32 batches (L, m, n); the fields that a codec record has of it.

    Seconds are those of the whole model, for each batch the best of `repeats`. Alphas are
    1 - ||C(x) - x||^2 / ||x||^2, of all layers together and their mean.
    """
    generator = torch.Generator().manual_seed(0)
    encode_seconds, decode_seconds, payload_bytes, errors, norms = 0.0, 0.0, 0, [], []
    for x in batches:
        m, n = x.shape[1:]
        fitted = compressor.fit(m, n)
        seconds, payload = fastest(partial(fitted.encode, x, generator), repeats)
        encode_seconds += seconds
        seconds, decoded = fastest(partial(fitted.decode, payload, m, n), repeats)
        decode_seconds += seconds
        payload_bytes += payload.numel()
        norms += squared_norms(x)
        errors += squared_norms(decoded - x)
    errors, norms = torch.tensor(errors), torch.tensor(norms)
    return {
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "payload_bytes": payload_bytes,
        "bits_per_parameter": 8 * payload_bytes / sum(x.numel() for x in batches),
        "alpha": float(1 - errors.sum() / norms.sum()),
        "alpha_layer_mean": float((1 - errors / norms).mean()),
    }


def squared_norms(x: Tensor) -> list[float]:
    """Of every matrix of (L, m, n)."""
    return [float(matrix.double().square().sum()) for matrix in x]


def shannon_alpha(bits_per_parameter: float) -> float:
    """The largest alpha that any code reaches on Gaussian noise: 1 - 2^(-2 R)."""
    return 1 - 4.0**-bits_per_parameter


def extra_memory(compressor: Compressor, shapes: Sequence[torch.Size]) -> int:
    """How far resident memory rises while a batch is encoded, in bytes, for the worst of `shapes`.

    The message counts, the input does not. To be called in a process of its own.
    """
    torch.set_num_threads(1)
    m_mmap_threshold = -3  # freed tensors leave resident memory at once: glibc keeps none of them
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 65536)
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


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """Yield the run record, then a codec record for every compressor and input."""
    torch.set_num_threads(1)
    config = compose((*DEFAULTS, *options.overrides)).config
    repeats = 1 if options.quick else REPEATS
    differences = momentum_difference(config)
    yield {
        "record": "run",
        "schema": 1,
        "overrides": options.overrides,
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
    shapes = [x.shape for x in noise]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        for compressor in COMPRESSORS:
            what = {"record": "codec", "compressor": str(compressor)}
            what["values"] = str(compressor.values)
            what["extra_bytes"] = process.submit(extra_memory, compressor, shapes).result()
            for kind, batches in zip(INPUTS, (differences, noise), strict=True):
                yield what | {"input": kind} | measured(compressor, batches, repeats)


def family(record: dict) -> str:
    """The family of a codec record's compressor."""
    first = record["compressor"].split()[0]
    return "quantize" if first in SHORT else first.replace("quantized", "quantized rank")


def table(records: Sequence[dict]) -> str:
    """The measurements, a compressor per line; times are those of the momentum."""
    (run,) = select(records, record="run")
    rows = [["compressor", "bits per parameter", "encode s", "decode s", "extra memory"]]
    rows[0] += ["alpha, momentum", "mean of layers", "alpha, noise", "Shannon bound"]
    both = (select(records, input=kind) for kind in INPUTS)
    for momentum, noise in zip(*both, strict=True):
        bits = momentum["bits_per_parameter"]
        row = [momentum["compressor"], f"{bits:.3f}"]
        row += [f"{momentum[seconds]:.2f}" for seconds in ("encode_seconds", "decode_seconds")]
        row.append(f"{momentum['extra_bytes'] / run['largest_layer_bytes']:.2f}")
        alphas = (momentum["alpha"], momentum["alpha_layer_mean"], noise["alpha"])
        rows.append([*row, *(f"{alpha:.4f}" for alpha in (*alphas, shannon_alpha(bits)))])
    return markdown(rows)


def draw(records: Sequence[dict], directory: Path) -> str:
    """Write README.md, codec.png and codec.svg; returns the table."""
    (run,) = select(records, record="run")
    values = run | {"table": table(records), "least": f"{LEAST_DRAWN:g}"}
    values["parameters"] = f"{run['parameters']:,}"
    values["megabytes"] = f"{run['largest_layer_bytes'] / 1e6:.1f}"
    (directory / "README.md").write_text(fill(TEXT.read_text(), values))
    draw_errors(select(records, record="codec"), directory / "codec")
    return values["table"]


def draw_errors(records: Sequence[dict], stem: Path) -> None:
    """1 - alpha against bits per parameter, a panel for each input, and the bound.

    Messages of one family and value format are joined. What loses next to nothing is left out.
    """
    drawn = [record for record in records if 1 - record["alpha"] > LEAST_DRAWN]
    markers = dict(zip(dict.fromkeys(r["values"] for r in drawn), MARKERS, strict=False))
    bound = {"color": "#777777", "linestyle": "--"}
    with panels(stem, 10, 5.5, 1, 2, sharex=True, sharey=True) as pair:
        for axes, (kind, title) in zip(pair, INPUTS.items(), strict=True):
            joined = {}
            for r in select(drawn, input=kind):
                point = (r["bits_per_parameter"], 1 - r["alpha"])
                joined.setdefault((family(r), r["values"]), []).append(point)
            for (name, values), points in joined.items():
                look = {"color": FAMILIES[name], "marker": markers[values], "linewidth": 0.6}
                axes.plot(*zip(*points, strict=True), **look)
            bits = [2 ** (step / 20) for step in range(-40, 61)]
            axes.plot(bits, [1 - shannon_alpha(rate) for rate in bits], **bound)
            axes.set(title=title, xlabel="bits per parameter", xscale="log", yscale="log")
        pair[0].set_ylabel("1 - alpha")
        plain_sizes(pair[0])
        names = dict.fromkeys(map(family, drawn))
        handles = [Line2D([], [], color=FAMILIES[name], label=name) for name in names]
        look = {"color": "#777777", "linestyle": ""}
        handles += [Line2D([], [], marker=markers[name], label=name, **look) for name in markers]
        handles.append(Line2D([], [], label="$2^{-2R}$, Shannon", **bound))
        pair[0].figure.legend(handles=handles, loc="outside right center")


def main(arguments: Sequence[str] | None = None) -> int:
    options = {
        "overrides": {"nargs": "*", "metavar": "KEY=VALUE", "help": "of the training run"},
        "--quick": {"action": "store_true", "help": f"measure once, not best of {REPEATS}"},
    }
    log = ROOT / "results" / "codec" / "codec.jsonl"
    return command(__doc__, log, measure, draw, options, arguments)


if __name__ == "__main__":
    sys.exit(main())
