"""What more blocks, and scales for rows and columns, save dithered integers.

    python scripts/codec/blocks.py [--out DIR] [--redraw] [KEY=VALUE ...]

Measured as by `run.py` beside it, of a training run that KEY=VALUE configures. The inputs are its
two, and numbers for which one scale is worst: one of size 1, the others 1 / sqrt(N). The records go
to blocks.jsonl in DIR, and from them comes blocks.md. A minute.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ef21_muon.compressors import from_spec
from scripts.codec.run import INPUTS, measured, momentum_difference, noise
from scripts.studies import OVERRIDES, command, fill, markdown, page, select
from training.config import ROOT, compose

TEXT = Path(__file__).with_name("blocks.md")
DEFAULTS = ("experiment=shakespeare", "steps=12", "batch.global_size=8")
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


def spikes(differences: Sequence[Tensor]) -> list[Tensor]:
    """Of the same shapes, COPIES times over, since few of their numbers are drawn."""
    found = [torch.full_like(x, (x.shape[1] * x.shape[2]) ** -0.5) for x in differences]
    for x in found:
        x[:, 0, 0] = 1.0
    return COPIES * found


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """A record for every format and input."""
    torch.set_num_threads(1)
    config = compose((*DEFAULTS, *options.overrides)).config
    differences = momentum_difference(config)
    parameters = sum(x.numel() for x in differences)
    yield {
        **{"record": "run", "schema": 2, "parameters": parameters, "rounds": config.steps},
        "torch": torch.__version__,
    }
    of_inputs = (differences, noise(differences), spikes(differences))
    inputs = dict(zip((*INPUTS, "spike"), of_inputs, strict=True))
    for bits, pattern in product(BITS, WAYS.values()):
        compressor = from_spec(f"quantize:{pattern.format(bits)}")
        omega = max(compressor.values.omega(*x.shape[1:]) for x in differences)
        what = {"record": "format", "format": pattern.format(bits), "omega": omega}
        for kind, batches in inputs.items():
            yield what | {"input": kind} | measured(compressor, batches)


def lost(records: Sequence[dict], kind: str, name: str) -> float:
    """||Q(x) - x||^2 / ||x||^2 of a format."""
    (one,) = select(records, input=kind, format=name)
    return 1 - one["alpha"]


def table(records: Sequence[dict]) -> str:
    rows = [["integers of", "a scale for", "bits per value", *INPUTS.values(), SPIKE, "bound"]]
    for bits, (way, pattern) in product(BITS, WAYS.items()):
        found = select(records, format=pattern.format(bits))
        errors = [f"{1 - one['alpha']:.3g}" for one in found]
        sizes, omega = f"{found[0]['bits_per_parameter']:.3f}", f"{found[0]['omega']:.3g}"
        rows.append([f"{bits} bits", way, sizes, *errors, omega])
    return markdown(rows, text_columns=2)


def report(records: Sequence[dict]) -> str:
    (run,) = select(records, record="run")

    def times(kind: str, one: str, other: str) -> float:
        """How many times less the other format loses."""
        return lost(records, kind, one) / lost(records, kind, other)

    def bits(name: str) -> str:
        return f"{select(records, format=name)[0]['bits_per_parameter']:.2f}"

    values = run | {
        "parameters": f"{run['parameters']:,}",
        "spike": f"{times('spike', 'int4@1blocks', 'int4@1024blocks'):,.0f}",
        "less": lambda kind: f"{times(kind, 'int4@1blocks', 'int4@1024blocks'):.1f}",
        "rows": f"{times('momentum', 'int4@1blocks', 'int4'):.1f}",
        "over": lambda name: f"{times('momentum', name, 'rowcol4'):.1f}",
        "bits": bits,
        "table": table(records),
    }
    return fill(TEXT.read_text(), values)


def main(arguments: Sequence[str] | None = None) -> int:
    log = ROOT / "results" / "codec" / "blocks.jsonl"
    return command(__doc__, log, measure, page(report, "blocks.md"), OVERRIDES, arguments)


if __name__ == "__main__":
    sys.exit(main())
