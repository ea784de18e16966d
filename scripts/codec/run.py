"""Measure every compressor on the message of one worker: time, bytes and error.

    python scripts/codec/run.py [--out DIR] [--redraw] [KEY=VALUE ...]

One thread encodes and decodes the whole model in the batches of equal shapes that the optimizer
makes. The inputs are a momentum difference M_j - G_j, taken from a short training run that
KEY=VALUE configures (Hydra overrides, as of train.py), and Gaussian noise of the same shapes. The
records go to codec.jsonl in DIR, and from them come README.md, codec.png and codec.svg.

Then, into blocks.jsonl and blocks.md, what more blocks and scales for rows and columns save
dithered integers: also of numbers for which one scale is worst, one of size 1, the others
1 / sqrt(N).
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
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
from scripts.studies import OVERRIDES, command, fill, markdown, page, select
from training.config import ROOT, build, compose
from training.data import open_data
from training.method import build_optimizer
from training.picture import line_look, panels, plain_sizes

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
FAMILIES = {"top": "top k", "random": "random k", "rank": "rank k", "quantized": "quantized rank"}

# Of the page on blocks.
BLOCKS_TEXT = Path(__file__).with_name("blocks.md")
BLOCKS_DEFAULTS = ("experiment=shakespeare", "steps=12", "batch.global_size=8")
BITS = (2, 3, 4, 8)
WAYS = {
    "1 block": "int{}@1blocks",
    "16 blocks": "int{}@16blocks",
    "1,024 blocks": "int{}@1024blocks",
    "a row": "int{}",
    "112 values": "int{}@112",  # about as many bits as the next
    "a row and a column": "rowcol{}",
}
SPIKE, COPIES = "one large number", 16


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


def fastest(call: Callable) -> tuple[float, Any]:
    """The least seconds of REPEATS calls, and what the last returned."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def measured(compressor: Compressor, batches: Sequence[Tensor]) -> dict:
    """Encode and decode float32 batches (L, m, n); the fields that a record has of it.

    Seconds are those of the whole model, for each batch the best of REPEATS; alpha is
    1 - ||C(x) - x||^2 / ||x||^2.
    """
    generator = torch.Generator().manual_seed(0)
    sums = Counter()
    for x in batches:
        m, n = x.shape[1:]
        fitted = compressor.fit(m, n)
        encoding, payload = fastest(partial(fitted.encode, x, generator))
        decoding, decoded = fastest(partial(fitted.decode, payload, m, n))
        sums.update(encode_seconds=encoding, decode_seconds=decoding)
        sums.update(payload_bytes=payload.numel(), numbers=x.numel())
        sums.update(error=square(decoded - x), square=square(x))
    measures = ("encode_seconds", "decode_seconds", "payload_bytes")
    return {
        **{measure: sums[measure] for measure in measures},
        "bits_per_parameter": 8 * sums["payload_bytes"] / sums["numbers"],
        "alpha": 1 - sums["error"] / sums["square"],
    }


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


def shannon_alpha(bits_per_parameter: float) -> float:
    """The largest alpha that any code reaches on Gaussian noise: 1 - 2^(-2 R)."""
    return 1 - 4.0**-bits_per_parameter


def inputs_of(overrides: Sequence[str]) -> tuple[dict, dict[str, list[Tensor]]]:
    """The run record and the inputs, of a short training and at random."""
    torch.set_num_threads(1)
    config = compose(overrides).config
    differences = momentum_difference(config)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator) for x in differences]
    run = {
        "record": "run",
        "overrides": overrides,
        "parameters": sum(x.numel() for x in differences),
        "layers": sum(len(x) for x in differences),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "repeats": REPEATS,
        "rounds": config.steps,
        "sequences": config.batch.global_size,
        "context": config.model.context,
        "data": config.data.name,
        "w2s": str(build(config.w2s, "w2s")),
    }
    return run, dict(zip(INPUTS, (differences, noise), strict=True))


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """Yield the run record, then a codec record for every compressor and input."""
    run, inputs = inputs_of((*DEFAULTS, *options.overrides))
    yield run
    for compressor, (kind, batches) in product(COMPRESSORS, inputs.items()):
        what = {"record": "codec", "compressor": str(compressor), "input": kind}
        yield what | measured(compressor, batches)


def table(records: Sequence[dict]) -> str:
    """The measurements, a compressor per line; times are those of the momentum."""
    rows = [["compressor", "bits per parameter", "encode s", "decode s"]]
    rows[0] += ["alpha, momentum", "alpha, noise", "Shannon bound"]
    both = (select(records, input=kind) for kind in INPUTS)
    for momentum, noise in zip(*both, strict=True):
        bits = momentum["bits_per_parameter"]
        row = [momentum["compressor"], f"{bits:.3f}"]
        row += [f"{momentum[seconds]:.2f}" for seconds in ("encode_seconds", "decode_seconds")]
        alphas = (momentum["alpha"], noise["alpha"])
        rows.append([*row, *(f"{alpha:.4f}" for alpha in (*alphas, shannon_alpha(bits)))])
    return markdown(rows)


def draw(records: Sequence[dict], directory: Path) -> str:
    """Write README.md, codec.png and codec.svg; returns the table."""
    run, *codecs = records
    values = run | {"table": table(codecs), "parameters": f"{run['parameters']:,}"}
    (directory / "README.md").write_text(fill(TEXT.read_text(), values))
    draw_errors(codecs, directory / "codec")
    return values["table"]


def draw_errors(records: Sequence[dict], stem: Path) -> None:
    """1 - alpha against bits per parameter, a panel for each input, and the bound."""
    rates = [2 ** (step / 20) for step in range(-40, 61)]
    with panels(stem, 10, 4.5, 1, 2, sharex=True, sharey=True) as pair:
        for axes, (kind, title) in zip(pair, INPUTS.items(), strict=True):
            families = {}
            for one in select(records, input=kind):
                family = FAMILIES.get(one["compressor"].split()[0], "all entries")
                point = (one["bits_per_parameter"], 1 - one["alpha"])
                families.setdefault(family, []).append(point)
            for index, (family, points) in enumerate(families.items()):
                look = line_look(index) | {"linestyle": ""}
                axes.plot(*zip(*points, strict=True), label=family, **look)
            bound = [1 - shannon_alpha(rate) for rate in rates]
            axes.plot(rates, bound, color="#777777", linestyle="--", label="Shannon")
            axes.set(title=title, xlabel="bits per parameter", xscale="log", yscale="log")
        pair[0].set(ylabel="1 - alpha", ylim=(1e-5, 4))
        plain_sizes(pair[0])
        pair[0].legend()


def spikes(like: Sequence[Tensor]) -> list[Tensor]:
    """Of the same shapes, COPIES times over, since few of their numbers are drawn."""
    found = [torch.full_like(x, (x.shape[1] * x.shape[2]) ** -0.5) for x in like]
    for x in found:
        x[:, 0, 0] = 1.0
    return COPIES * found


def measure_blocks(options: argparse.Namespace) -> Iterator[dict]:
    """A record for every format and input."""
    run, inputs = inputs_of((*BLOCKS_DEFAULTS, *options.overrides))
    yield run
    inputs["spike"] = spikes(inputs["noise"])
    for bits, pattern in product(BITS, WAYS.values()):
        compressor = from_spec(f"quantize:{pattern.format(bits)}")
        omega = max(compressor.values.omega(*x.shape[1:]) for x in inputs["noise"])
        what = {"record": "format", "format": pattern.format(bits), "omega": omega}
        for kind, batches in inputs.items():
            yield what | {"input": kind} | measured(compressor, batches)


def blocks_table(records: Sequence[dict]) -> str:
    rows = [["integers of", "a scale for", "bits per value", *INPUTS.values(), SPIKE, "bound"]]
    for bits, (way, pattern) in product(BITS, WAYS.items()):
        found = select(records, format=pattern.format(bits))
        errors = [f"{1 - one['alpha']:.3g}" for one in found]
        sizes, omega = f"{found[0]['bits_per_parameter']:.3f}", f"{found[0]['omega']:.3g}"
        rows.append([f"{bits} bits", way, sizes, *errors, omega])
    return markdown(rows, text_columns=2)


def blocks_report(records: Sequence[dict]) -> str:
    run, *formats = records
    lost = {(one["input"], one["format"]): 1 - one["alpha"] for one in formats}
    bits = {one["format"]: f"{one['bits_per_parameter']:.2f}" for one in formats}

    def times(kind: str, one: str, other: str) -> float:
        """How many times less the other format loses."""
        return lost[kind, one] / lost[kind, other]

    values = run | {
        "parameters": f"{run['parameters']:,}",
        "spike": f"{times('spike', 'int4@1blocks', 'int4@1024blocks'):,.0f}",
        "less": lambda kind: f"{times(kind, 'int4@1blocks', 'int4@1024blocks'):.1f}",
        "rows": f"{times('momentum', 'int4@1blocks', 'int4'):.1f}",
        "over": lambda name: f"{times('momentum', name, 'rowcol4'):.1f}",
        "bits": bits.get,
        "table": blocks_table(records),
    }
    return fill(BLOCKS_TEXT.read_text(), values)


def main(arguments: Sequence[str] | None = None) -> int:
    folder = ROOT / "results" / "codec"
    studies = (
        ("codec.jsonl", measure, draw),
        ("blocks.jsonl", measure_blocks, page(blocks_report, "blocks.md")),
    )
    return max(command(__doc__, folder / log, *how, OVERRIDES, arguments) for log, *how in studies)


if __name__ == "__main__":
    sys.exit(main())
