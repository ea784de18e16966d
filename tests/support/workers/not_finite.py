"""What is not finite on rank 1 of two, in one layer at step BROKEN, as `rank<r>.json`.

Run by torchrun with a directory; see test_not_finite.py.
"""

import json
import sys
from contextlib import nullcontext
from math import inf, nan
from pathlib import Path

import torch
import torch.distributed as dist

from baselines import DeMo, Dion
from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import Identity, Quantize, RankK, TopK
from ef21_muon.norms import L1, Sign

SHAPES = {"query": (6, 10), "key": (6, 10), "value": (6, 10), "head": (9, 4), "bias": (7,)}
LAYER, BROKEN, STEPS = "key", 3, 4
LARGE = 1e31  # what Overflowing makes infinity of


class Overflowing(Identity):
    """A message that is not finite, of a gradient that is."""

    def encode(self, x, generator=None):
        return super().encode(torch.where(x.abs() > LARGE / 2, inf, x), generator)


def ef21(**options):
    return lambda p: EF21Muon(p, lr=0.1, **options)


def local(inner=torch.optim.SGD, **options):
    return lambda p: LocalSteps(
        inner(p, lr=0.1), **{"sync_every": 1, "w2s": Quantize("int8")} | options
    )


def muon(parameters, lr):
    return EF21Muon(parameters, lr=lr, process_group=ALONE)


CASES = {
    "identity": (ef21(), nan),
    "rank0": (ef21(server="rank0", w2s=TopK(0.3), s2w=TopK(0.3)), nan),
    "sharded": (ef21(server="sharded", w2s=RankK(0.5), weight_decay=0.1), inf),
    "replicated": (ef21(server="replicated", w2s=Quantize("natural")), -inf),
    "signs": (ef21(norm=Sign(), w2s=Quantize("sign"), momentum=0), inf),
    "one entry": (ef21(norm=L1(), feedback="none", momentum=0), -inf),
    "ef14": (ef21(feedback="ef14", server_momentum=0.5, w2s=TopK(0.3)), nan),
    "feedback of steps": (ef21(lmo_feedback=True, feedback="none", momentum=0), nan),
    "overflowing": (ef21(w2s=Overflowing(), momentum=0), LARGE),
    "sign muon": (ef21(lmo="workers", feedback="none", w2s=Quantize("sign@tensor")), nan),
    "dion": (lambda p: Dion([{"name": "hidden", "params": p}], 0.1, weight_decay=0.0), nan),
    "demo": (lambda p: DeMo(p, lr=0.1, k=4, chunk=4, weight_decay=0.0), -inf),
    "averaged": (lambda p: AveragedGradients(torch.optim.AdamW(p, lr=0.1)), nan),
    "averaged, top": (lambda p: AveragedGradients(torch.optim.SGD(p, 0.1), w2s=TopK(0.3)), inf),
    "local": (local(), nan),
    "local, outer": (local(outer_momentum=0.5, server="rank0", s2w=TopK(0.3)), inf),
    "local, muon": (local(muon, sync_every=3, feedback="ef21"), nan),
    "local, plain": (local(w2s=Identity(), feedback="none", sync_every=3), -inf),
    "local, delayed": (local(sync_every=3, sync_delay=1), nan),
}


def error_of(do):
    try:
        do()
    except FloatingPointError as error:
        return str(error)
    return ""


def trained(name, faulty):
    make, value = CASES[name]
    generator = torch.Generator().manual_seed(0)
    layers = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}
    optimizer = make(list(layers.items()))
    generator.manual_seed(1 + dist.get_rank())
    models = []
    for step in range(1, STEPS + 1):
        for layer, parameter in layers.items():
            parameter.grad = torch.randn(SHAPES[layer], generator=generator)
            if faulty and layer == LAYER and step == BROKEN and dist.get_rank() == 1:
                parameter.grad[1, 2] = value
        optimizer.step()
        with getattr(optimizer, "global_params", nullcontext)():
            models.append({n: p.detach().flatten().tolist() for n, p in layers.items()})
    return {
        "models": models,
        "finite": error_of(optimizer.check_finite),
        "agreement": error_of(optimizer.check_agreement),
    }


def main(directory):
    dist.init_process_group("gloo")
    report = {f"{name} {faulty}": trained(name, faulty) for name in CASES for faulty in (0, 1)}
    (directory / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
