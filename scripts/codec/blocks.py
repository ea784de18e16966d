"""What more blocks, and a diagonal geometry, save dithered integers.

    python scripts/codec/blocks.py [--out DIR] [--redraw] [KEY=VALUE ...]

The relative variance E ||Q(x) - x||^2 / ||x||^2 of integers with B scales per message, and of
`RowColumn`: predicted for these very numbers by a formula,

    x in steps of its block's scale has the variance share (1 - share) step^2, share what is over a
    whole number of steps,

measured over draws of the formats, and as `omega` bounds it for any numbers. The inputs are the
momentum difference of a model after a short training run that KEY=VALUE configures, Gaussian noise
of the same shapes, and numbers for which one scale is worst: one of size 1, the others 1 / sqrt(N).
The records go to blocks.jsonl in DIR, and from them come blocks.md and blocks.png. A minute.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon.compressors.base import value_format
from ef21_muon.values.base import ValueFormat
from scripts.codec.run import momentum_difference
from scripts.studies import command, fill, markdown, select
from training.config import ROOT, compose
from training.picture import COLOURS, line_look, panels

TEXT = Path(__file__).with_name("blocks.md")
DEFAULTS = ("experiment=shakespeare", "steps=12", "batch.global_size=8")
BLOCKS = tuple(2**power for power in range(0, 11, 2))
BITS = (2, 3, 4, 8)
DRAWS = 16
INPUTS = {"momentum": "momentum difference", "noise": "Gaussian noise", "spike": "one large number"}
WAYS = {
    "one block": "int{}@1blocks",
    "a row": "int{}",
    "112 values": "int{}@112",  # about as many bits as the next
    "a row and a column": "rowcol{}",
}


def inputs(differences: list[Tensor]) -> dict[str, list[Tensor]]:
    """Matrices (L, m, n) of the shapes of the first, by name."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator) for x in differences]
    spikes = [torch.full_like(x, (x.shape[1] * x.shape[2]) ** -0.5) for x in differences]
    for spike in spikes:
        spike[:, 0, 0] = 1.0
    return {"momentum": differences, "noise": noise, "spike": spikes}


def variance(x: Tensor, bits: int, blocks: int | None, power: float) -> float:
    """Of integers of x D^(-1/2) times D^(1/2), by the formula; D = c^(2 power) of the columns.

    blocks: of the whole message; None is one for every row.
    """
    x = x.double()
    largest = x.abs().amax(1, keepdim=True)
    root = largest.masked_fill(largest == 0, 1) ** power
    scaled = (x / root).view(len(x), blocks or x.shape[1], -1)
    step = scaled.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    steps = scaled / step.masked_fill(step == 0, 1)
    share = steps - steps.floor()
    of_entries = (share * (1 - share) * step.square()).view_as(x) * root.square()
    return float(of_entries.sum())


def squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def drawn(x: Tensor, values: ValueFormat) -> float:
    """The mean of ||Q(x) - x||^2 over draws of the format."""
    generator = torch.Generator().manual_seed(0)
    draws = (values.decode(values.encode(x, generator), *x.shape[1:]) - x for _ in range(DRAWS))
    return sum(map(squares, draws)) / DRAWS


def measured(batches: list[Tensor], name: str) -> dict:
    """What a format's record has of it."""
    values = value_format(name)
    sent = sum(len(x) * values.payload_bytes(*x.shape[1:]) for x in batches)
    return {
        "record": "format",
        "bits_a_value": 8 * sent / sum(x.numel() for x in batches),
        "measured": sum(drawn(x, values) for x in batches) / sum(map(squares, batches)),
        "omega": max(values.omega(*x.shape[1:]) for x in batches),
    }


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """A record for every input and format; the smoothness matrix's own power is predicted alone."""
    torch.set_num_threads(1)
    config = compose((*DEFAULTS, *options.overrides)).config
    differences = momentum_difference(config)
    yield {
        "record": "run",
        "schema": 1,
        "parameters": sum(x.numel() for x in differences),
        "rounds": config.steps,
        "draws": DRAWS,
        "torch": torch.__version__,
    }
    for kind, batches in inputs(differences).items():
        whole = sum(map(squares, batches))
        for bits in BITS:
            formulas = {f"int{bits}@{blocks}blocks": (blocks, 0.0) for blocks in BLOCKS}
            formulas |= {f"int{bits}": (None, 0.0), f"rowcol{bits}": (None, 0.5)}
            for name, how in {**formulas, f"int{bits}@112": None}.items():
                lost = how and sum(variance(x, bits, *how) for x in batches) / whole
                yield {"input": kind, "format": name, "predicted": lost, **measured(batches, name)}
            own = sum(variance(x, bits, None, 1.0) for x in batches) / whole
            yield {"record": "own power", "input": kind, "bits": bits, "predicted": own}


def by_format(records: Sequence[dict]) -> dict[tuple[str, str], dict]:
    """By input and format."""
    return {(r["input"], r["format"]): r for r in select(records, record="format")}


def blocks_table(records: Sequence[dict]) -> str:
    """Of four bits."""
    found, both = by_format(records), ("predicted", "measured")
    rows = [["blocks", *(f"{what}, {i}" for i in INPUTS.values() for what in both), "bound"]]
    for blocks in BLOCKS:
        of_inputs = [found[kind, f"int4@{blocks}blocks"] for kind in INPUTS]
        lost = [f"{one[what]:.3g}" for one in of_inputs for what in both]
        rows.append([str(blocks), *lost, f"{of_inputs[0]['omega']:.3g}"])
    return markdown(rows, text_columns=0)


def ways_table(records: Sequence[dict]) -> str:
    found = by_format(records)
    rows = [["integers of", "a scale for", "bits per value", *INPUTS.values(), "bound"]]
    for bits in BITS:
        for way, pattern in WAYS.items():
            of_way = [found[kind, pattern.format(bits)] for kind in INPUTS]
            row = [f"{bits} bits", way, f"{of_way[0]['bits_a_value']:.3f}"]
            row += [f"{one['measured']:.3g}" for one in of_way]
            rows.append([*row, f"{of_way[0]['omega']:.3g}"])
        own = [f"{one['predicted']:.3g}" for one in select(records, record="own power", bits=bits)]
        rows.append([f"{bits} bits", "the same, c_j^2 (predicted)", "", *own, ""])
    return markdown(rows, text_columns=2)


def draw(records: Sequence[dict], directory: Path) -> str:
    """Write blocks.md, blocks.png and blocks.svg; returns the page."""
    (run,), found = select(records, record="run"), by_format(records)
    most = f"int4@{BLOCKS[-1]}blocks"

    def times(kind: str, one: str, other: str) -> float:
        """How many times less the other format loses."""
        return found[kind, one]["measured"] / found[kind, other]["measured"]

    values = run | {
        "most": f"{BLOCKS[-1]:,}",
        "parameters": f"{run['parameters']:,}",
        "spike": f"{times('spike', 'int4@1blocks', most):,.0f}",
        "less": lambda kind: f"{times(kind, 'int4@1blocks', most):.1f}",
        "rows": f"{times('momentum', 'int4@1blocks', 'int4'):.1f}",
        "over": lambda name: f"{times('momentum', name, 'rowcol4'):.1f}",
        "bits": lambda name: f"{found['momentum', name]['bits_a_value']:.2f}",
        "blocks": blocks_table(records),
        "ways": ways_table(records),
    }
    page = fill(TEXT.read_text(), values)
    (directory / "blocks.md").write_text(page)
    draw_variance(found, directory / "blocks")
    return page


def draw_variance(found: dict[tuple[str, str], dict], stem: Path) -> None:
    """Relative variance against blocks in four bits, and against bits."""
    with panels(stem, 10, 4, 1, 2) as (by_blocks, by_bits):
        names = [f"int4@{blocks}blocks" for blocks in BLOCKS]
        for index, (kind, title) in enumerate(INPUTS.items()):
            of_kind = [found[kind, name] for name in names]
            lost, expected = ([one[what] for one in of_kind] for what in ("measured", "predicted"))
            look = line_look(index)
            by_blocks.plot(BLOCKS, lost, label=title, **look)
            by_blocks.plot(BLOCKS, expected, color="#777777", linewidth=0.7)
            rowcol = found[kind, "rowcol4"]["measured"]
            by_blocks.axhline(rowcol, color=look["color"], linestyle=":", linewidth=0.9)
        bounds = [found["noise", name]["omega"] for name in names]
        by_blocks.plot(BLOCKS, bounds, color="#777777", linestyle="--", label="bound")
        label = "blocks per message (dotted: a row and a column)"
        by_blocks.set(xscale="log", yscale="log", xlabel=label, ylabel="relative variance")
        by_blocks.set_title("4 bits")
        by_blocks.legend(fontsize=7)
        for index, (way, pattern) in enumerate(WAYS.items()):
            points = [found["momentum", pattern.format(bits)] for bits in BITS]
            sizes, lost = ([one[what] for one in points] for what in ("bits_a_value", "measured"))
            by_bits.plot(sizes, lost, label=way, **(line_look(index) | {"color": COLOURS[index]}))
        by_bits.set(yscale="log", xlabel="bits per value", title="momentum difference")
        by_bits.legend(fontsize=7)


def main(arguments: Sequence[str] | None = None) -> int:
    overrides = {"nargs": "*", "metavar": "KEY=VALUE", "help": "of the training run"}
    log = ROOT / "results" / "codec" / "blocks.jsonl"
    return command(__doc__, log, measure, draw, {"overrides": overrides}, arguments)


if __name__ == "__main__":
    sys.exit(main())
