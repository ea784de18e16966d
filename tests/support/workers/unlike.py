"""Ranks on unlike processors: what they decode, which optimizers are refused, and who agrees.

`unlike.py RANK RANKS FOLDER`, started by tests/ef21_muon/test_unlike.py in an environment for each
rank, by which libraries compute as on another processor. Writes FOLDER/RANK.json.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ef21_muon import AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import (
    Bernoulli,
    ChunkTopK,
    Quantize,
    QuantizedRank,
    RandK,
    RankK,
    Scaled,
    TopColumns,
    TopK,
    TopSingular,
)
from ef21_muon.compressors.base import numbers
from ef21_muon.norms import AdaptiveRadius, Sign
from ef21_muon.transport.agreement import fingerprint

FORMATS = (
    *("float32", "bfloat16", "natural", "natural4@tensor", "int2", "int8@128", "normal1"),
    *("normal2", "normal4@tensor", "normal6", "sign", "sign@8blocks", "rowcol4", "statistical4"),
)
COMPRESSORS = {
    "quantize": Quantize,
    "topk": lambda values: TopK(0.1, values),
    "randk": lambda values: RandK(0.1, values),
    "chunk_topk": lambda values: ChunkTopK(32, 32, values),
    "top_columns": lambda values: TopColumns(0.3, values),
    "scaled": lambda values: Scaled(TopK(0.3, values), 0.7),
    "bernoulli": lambda values: Bernoulli(Quantize(values), 0.9),
}
LOW_RANK = {
    "rank": lambda values: RankK(0.5, values),
    "quantized_rank": lambda values: QuantizedRank(0.5, values),
    "top_singular": lambda values: TopSingular(0.5, values),
    "scaled rank": lambda values: Scaled(RankK(0.5, values), 0.7),
}
SHAPES = [(96, 80), (200, 1)]
NESTEROV = {"sync_every": 2, "outer_lr": 0.7, "outer_momentum": 0.6}
TOP, RANK = TopK(0.3), RankK(0.4)


def local(parameters, **options):
    return LocalSteps(torch.optim.SGD(parameters, lr=0.1), **NESTEROV | options)


def averaged(parameters, **options):
    return AveragedGradients(torch.optim.AdamW(parameters, lr=0.01), w2s=TOP, **options)


class Unseen(EF21Muon):
    """Other bits are not seen before the first step, as those of a user's own compressor."""

    def _steps_of_all(self, server):
        return iter(())


OPTIMIZERS = {
    "unseen": lambda p: Unseen(p, w2s=TOP, server="replicated"),
    "muon replicated": lambda p: EF21Muon(p, w2s=TOP, server="replicated"),
    "muon auto": lambda p: EF21Muon(p, w2s=TopK(0.01)),
    "muon sharded": lambda p: EF21Muon(p, w2s=RANK, server="sharded"),
    "muon rank0": lambda p: EF21Muon(p, w2s=RANK, server="rank0"),
    "muon s2w": lambda p: EF21Muon(p, w2s=TOP, s2w=RANK, server="sharded"),
    "muon s2w quantize": lambda p: EF21Muon(p, w2s=RANK, s2w=Quantize("normal4"), server="sharded"),
    "signs": lambda p: EF21Muon(
        p, w2s=TOP, norm=Sign(), weight_decay=0.3, server="replicated", momentum=0.7
    ),
    "signs rank": lambda p: EF21Muon(p, w2s=RANK, norm=Sign(), server="replicated"),
    "signs adaptive": lambda p: EF21Muon(
        p, w2s=TOP, norm=Sign(), radius=AdaptiveRadius(1, 1), server="replicated"
    ),
    "sign muon": lambda p: EF21Muon(
        p, lmo="workers", feedback="none", w2s=Quantize("sign"), server="replicated"
    ),
    "local normal2": lambda p: local(p, w2s=Quantize("normal2"), server="replicated"),
    "local sign": lambda p: local(p, w2s=Quantize("sign"), server="replicated"),
    "local rank": lambda p: local(p, w2s=RANK, server="replicated"),
    "local rank sharded": lambda p: local(p, w2s=RANK, server="sharded"),
    "local rank auto": lambda p: local(p, w2s=RankK(0.05)),
    "averaged": averaged,
    "averaged sharded": lambda p: averaged(p, server="sharded"),
}


def new_model() -> nn.Sequential:
    """Alike on all ranks, where torch's own random numbers are not."""
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(numbers(parameter.numel()).view_as(parameter) / (1 << 25))
    return model


def formats_of(kind: str) -> tuple[str, ...]:
    """All alone, and one of each sort in what chooses entries."""
    return FORMATS if kind == "quantize" else FORMATS[::4]


def decoded() -> dict[str, list[int]]:
    """Of rank 0's messages."""
    found = {}
    for kind, make in (COMPRESSORS | LOW_RANK).items():
        for values in formats_of(kind):
            of_shapes = []
            for m, n in SHAPES:
                compressor, x = make(values), torch.randn(2, m, n)
                message = compressor.encode(x)
                dist.broadcast(message, 0)
                of_shapes.append(fingerprint(compressor.decode(message, m, n)).item())
            found[f"{kind} {values}"] = of_shapes
    return found


def train(make) -> dict:
    """Its placement, and how it ends."""
    model = new_model()
    try:
        optimizer = make(model.named_parameters())
        for _ in range(4):
            model.zero_grad()
            model(torch.randn(8, 48)).square().mean().backward()
            optimizer.step()
        optimizer.check_agreement()
    except ValueError as error:
        return {"error": str(error)}
    return {"server": optimizer.server}


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    logging.basicConfig(filename=folder / f"{rank}.log", format="%(message)s")
    torch.manual_seed(rank)
    report = {"decoded": decoded()}
    report |= {name: train(make) for name, make in OPTIMIZERS.items()}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()


if __name__ == "__main__":
    main()
