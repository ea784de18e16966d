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
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon.compressors.base import value_format
from ef21_muon.values.base import ValueFormat
from scripts.codec.run import momentum_difference
from scripts.measuring import markdown
from training.config import ROOT, compose
from training.drawing import Figure, matplotlib
from training.picture import COLOURS, STYLE, line_look, save
from training.workers import RunError

DEFAULTS = ("experiment=shakespeare", "steps=12", "batch.global_size=8")
BLOCKS = tuple(2**power for power in range(0, 11, 2))
BITS = (2, 3, 4, 8)
DRAWN_BITS = 4  # in the first panel
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


def variance(x: Tensor, bits: int, blocks: int, power: float = 0.0) -> float:
    """Of integers of x D^(-1/2) times D^(1/2), by the formula; D = c^(2 power) of the columns."""
    x = x.double()
    largest = x.abs().amax(1, keepdim=True)
    root = largest.masked_fill(largest == 0, 1) ** power
    scaled = (x / root).view(len(x), blocks, -1)
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


def format_record(kind: str, batches: list[Tensor], name: str, predicted: float | None) -> dict:
    values = value_format(name)
    sent = sum(len(x) * values.payload_bytes(*x.shape[1:]) for x in batches)
    return {
        "record": "format",
        "input": kind,
        "format": name,
        "bits_a_value": 8 * sent / sum(x.numel() for x in batches),
        "predicted": predicted,
        "measured": sum(drawn(x, values) for x in batches) / sum(map(squares, batches)),
        "omega": max(values.omega(*x.shape[1:]) for x in batches),
    }


def all_records(overrides: Sequence[str]) -> Iterator[dict]:
    torch.set_num_threads(1)
    config = compose((*DEFAULTS, *overrides)).config
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

        def predicted(bits, blocks=None, power=0.0, batches=batches, whole=whole) -> float:
            """blocks: None has one for every row."""
            of_batches = (variance(x, bits, blocks or x.shape[1], power) for x in batches)
            return sum(of_batches) / whole

        for bits in BITS:
            for blocks in BLOCKS:
                name = f"int{bits}@{blocks}blocks"
                yield format_record(kind, batches, name, predicted(bits, blocks))
            yield format_record(kind, batches, f"int{bits}", predicted(bits))
            yield format_record(kind, batches, f"int{bits}@112", None)
            yield format_record(kind, batches, f"rowcol{bits}", predicted(bits, power=0.5))
            own = predicted(bits, power=1.0)
            yield {"record": "own power", "input": kind, "bits": bits, "predicted": own}


def read(log_file: Path) -> list[dict]:
    return [json.loads(line) for line in log_file.read_text().splitlines()]


def of_formats(records: Sequence[dict]) -> dict[tuple[str, str], dict]:
    """By input and format, which earlier records call smooth4 in place of rowcol4."""
    return {
        (r["input"], r["format"].replace("smooth", "rowcol")): r
        for r in records
        if r["record"] == "format"
    }


def gain(found: dict[tuple[str, str], dict], kind: str, one: str, other: str) -> float:
    """How many times less the other format loses, as measured."""
    return found[kind, one]["measured"] / found[kind, other]["measured"]


def blocks_table(records: Sequence[dict]) -> str:
    found = of_formats(records)
    rows = [
        [
            "blocks",
            *(f"{what}, {i}" for i in INPUTS.values() for what in ("predicted", "measured")),
            "bound",
        ]
    ]
    for blocks in BLOCKS:
        name = f"int{DRAWN_BITS}@{blocks}blocks"
        of_name = [found[kind, name] for kind in INPUTS]
        cells = [f"{one[what]:.3g}" for one in of_name for what in ("predicted", "measured")]
        rows.append([str(blocks), *cells, f"{of_name[0]['omega']:.3g}"])
    return markdown(rows, text_columns=0)


def ways_table(records: Sequence[dict]) -> str:
    found = of_formats(records)
    own = {(r["input"], r["bits"]): r["predicted"] for r in records if r["record"] == "own power"}
    rows = [["integers of", "a scale for", "bits per value", *INPUTS.values(), "bound"]]
    for bits in BITS:
        for way, pattern in WAYS.items():
            of_way = [found[kind, pattern.format(bits)] for kind in INPUTS]
            lost = [f"{one['measured']:.3g}" for one in of_way]
            numbers = [f"{of_way[0]['bits_a_value']:.3f}", *lost, f"{of_way[0]['omega']:.3g}"]
            rows.append([f"{bits} bits", way, *numbers])
        lost = [f"{own[kind, bits]:.3g}" for kind in INPUTS]
        rows.append([f"{bits} bits", "the same, c_j^2 (predicted)", "", *lost, ""])
    return markdown(rows, text_columns=2)


def report(records: Sequence[dict]) -> str:
    """blocks.md."""
    run, found = records[0], of_formats(records)
    most, name = BLOCKS[-1], f"int{DRAWN_BITS}"
    fewer = {kind: gain(found, kind, f"{name}@1blocks", f"{name}@{most}blocks") for kind in INPUTS}
    by_row = gain(found, "momentum", f"{name}@1blocks", name)
    rowcol = f"rowcol{DRAWN_BITS}"
    over = {ways: gain(found, "momentum", ways, rowcol) for ways in (name, f"{name}@112")}
    bits = {what: found["momentum", what]["bits_a_value"] for what in (*over, rowcol)}
    text = f"""In {DRAWN_BITS} bits, {most:,} blocks lose {fewer["spike"]:,.0f} times less than one
of the worst numbers: there, n blocks save a factor O(n). (The bound falls as 1 / B where
N / (4 s^2) is the smaller of its two, and as 1 / sqrt(B) before.) Of noise they lose
{fewer["noise"]:.1f} times less, since the largest of many Gaussian numbers is little larger than
that of few, and of the momentum difference {fewer["momentum"]:.1f} times less. A scale per row
loses {by_row:.1f} times less than one.

`rowcol` has a scale for every row, and for every column the root of its largest magnitude. Of the
momentum difference in {DRAWN_BITS} bits it loses {over[name]:.1f} times less than scales of rows
alone, with {bits[rowcol]:.2f} bits per value for {bits[name]:.2f}, and at equal bits
({bits[f"{name}@112"]:.2f}) {over[f"{name}@112"]:.1f} times less than a scale for 112 values. With
the largest magnitudes themselves, which is the smoothness matrix's own power, more is lost again:
what is small in a column that is small would be written as finely as what is large."""
    return f"""# Blocks, and a diagonal geometry

`python scripts/codec/blocks.py`, a minute (torch {run["torch"]}). What dithered integers lose,
E ||Q(x) - x||^2 / ||x||^2: of the momentum difference of a worker of the study
({run["parameters"]:,} parameters, after {run["rounds"]} rounds), of Gaussian noise, and of numbers
where one has size 1 and the others 1 / sqrt(N), for which one scale is worst. Bounds are of the
shape that has the largest.

![Relative variance against the number of blocks, and against bits](blocks.png)

{blocks_table(records)}

{paragraphs_of(text)}

{ways_table(records)}

That n blocks save a factor O(n) is from the abstract of "Theoretically Better and Numerically
Faster Distributed Optimization with Smoothness-Aware Quantization Techniques" (arXiv:2106.03524),
which alone was at hand; there n is the number of nodes as well, and what is saved is communication
to a given accuracy, which is not measured here. Predictions and bounds are this library's own. Its
smoothness matrices are of a convex problem's data and known to the server; here a message carries
the
diagonal, of itself.
"""


def paragraphs_of(text: str) -> str:
    return "\n\n".join(textwrap.fill(part, 100) for part in text.split("\n\n"))


def figure(records: Sequence[dict]) -> Figure:
    found = of_formats(records)
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(10, 4), layout="constrained")
        by_blocks, by_bits = drawing.subplots(1, 2)
        names = [f"int{DRAWN_BITS}@{blocks}blocks" for blocks in BLOCKS]
        for index, (kind, title) in enumerate(INPUTS.items()):
            of_kind = [found[kind, name] for name in names]
            look = line_look(index)
            by_blocks.plot(BLOCKS, [one["measured"] for one in of_kind], label=title, **look)
            by_blocks.plot(
                BLOCKS, [one["predicted"] for one in of_kind], color="#777777", linewidth=0.7
            )
            rowcol = found[kind, f"rowcol{DRAWN_BITS}"]["measured"]
            by_blocks.axhline(rowcol, color=look["color"], linestyle=":", linewidth=0.9)
        bounds = [found["noise", name]["omega"] for name in names]
        by_blocks.plot(BLOCKS, bounds, color="#777777", linestyle="--", label="bound")
        by_blocks.set(
            xscale="log",
            yscale="log",
            xlabel="blocks per message (dotted: a row and a column)",
            ylabel="relative variance",
            title=f"{DRAWN_BITS} bits",
        )
        by_blocks.legend(fontsize=7)
        for index, (way, pattern) in enumerate(WAYS.items()):
            points = [found["momentum", pattern.format(bits)] for bits in BITS]
            by_bits.plot(
                [one["bits_a_value"] for one in points],
                [one["measured"] for one in points],
                label=way,
                **(line_look(index) | {"color": COLOURS[index]}),
            )
        by_bits.set(yscale="log", xlabel="bits per value", title="momentum difference")
        by_bits.legend(fontsize=7)
    return drawing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the training run")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "results" / "codec")
    parser.add_argument("--redraw", action="store_true", help="from DIR/blocks.jsonl, no measuring")
    options = parser.parse_intermixed_args(arguments)
    log_file = options.out / "blocks.jsonl"
    try:
        if not options.redraw:
            lines = [json.dumps(record) + "\n" for record in all_records(options.overrides)]
            log_file.write_text("".join(lines))
        records = read(log_file)
    except (RunError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (options.out / "blocks.md").write_text(report(records))
    save(figure(records), options.out / "blocks")
    print(report(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
