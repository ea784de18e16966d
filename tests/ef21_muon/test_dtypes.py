"""A step computes in its own precision: whatever the caller's dtype, and that of the parameters."""

from functools import cache
from itertools import cycle

import pytest
import torch
from torch import nn

from baselines import DeMo, Dion
from ef21_muon import ALONE, EF21Muon, LocalSteps
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
from ef21_muon.norms import Sign, Spectral

COMPRESSORS = {
    "chunks": ChunkTopK(8, 8, "statistical2"),
    "scaled": Scaled(Quantize("int4")),
    "quantize": Quantize("normal2"),
    "bernoulli": Bernoulli(TopK(0.3), 0.5),
    "quantized rank": QuantizedRank(0.3),
    "randk": RandK(0.3, "natural4"),
    "rank": RankK(0.3, "int4"),
    "statistical": Quantize("statistical4"),
    "columns": TopColumns(0.3),
    "singular": TopSingular(0.3),
    "topk": TopK(0.2),
}
METHODS = {
    **{
        f"{name} both ways": lambda groups, c=compressor: EF21Muon(
            groups, lr=0.02, w2s=c, s2w=c, weight_decay=0.1
        )
        for name, compressor in COMPRESSORS.items()
    },
    "uncompressed": lambda groups: EF21Muon(groups, lr=0.02, weight_decay=0.1),
    "local": lambda groups: LocalSteps(
        EF21Muon(groups, lr=0.02, process_group=ALONE),
        sync_every=2,
        w2s=Quantize("int8"),  # of steps of one size TopK would choose any
        s2w=Quantize("natural"),
        outer_momentum=0.5,
    ),
    "local, under way": lambda groups: LocalSteps(
        torch.optim.SGD(nn.ParameterList([p for g in groups for p in g["params"]]), lr=0.02),
        sync_every=3,
        w2s=Quantize("int4"),
        sync_delay=1,
    ),
    "dion": lambda groups: Dion(groups, lr=0.02),
    "demo": lambda groups: DeMo(groups, lr=0.002),
}
SHAPES = {"wide": (12, 20), "tall": (20, 12), "head": (10, 16), "bias": (15,)}
STEPS = 3


@cache
def steps(method, dtype=torch.float32):
    """The parameters after STEPS steps on given gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    layers = {name: nn.Parameter(torch.randn(s, **draw).to(dtype)) for name, s in SHAPES.items()}
    head = layers.pop("head")
    groups = [
        {"name": "hidden", "params": [*layers.values()], "norm": Spectral(dtype=torch.float32)},
        {"name": "head", "params": [head], "norm": Sign(), "radius": 3.0},
    ]
    if method in ("dion", "demo"):
        groups = [{"name": g["name"], "params": g["params"]} for g in groups]
    optimizer = METHODS[method](groups)
    parameters = [*layers.values(), head]
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, **draw).to(dtype)
        optimizer.step()
    optimizer.check_finite()
    return torch.cat([parameter.detach().flatten().double() for parameter in parameters])


@pytest.mark.parametrize(
    ("method", "default"), [*zip(METHODS, cycle([torch.bfloat16, torch.float64]), strict=False)]
)
def test_torchs_default_dtype_changes_nothing(method, default):
    expected = steps(method)
    torch.set_default_dtype(default)
    try:
        found = steps.__wrapped__(method)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_within_autocast_is_the_same(method):
    expected = steps(method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(steps.__wrapped__(method), expected)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("dion", "demo")])
def test_parameters_in_float64_take_the_steps_of_float32(method):
    torch.testing.assert_close(steps(method, torch.float64), steps(method), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_layer_of_a_batch_keeps_the_digits_that_it_needs(order):
    """Steps of 1e-3 are lost in a W of bfloat16 and steps of 1e-9 in an X of float32."""
    layers = [nn.Parameter(torch.ones(4, 4, dtype=d)) for d in (torch.bfloat16, torch.float32)]
    wide = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    mixed = EF21Muon([layers[place] for place in order], lr=1e-3)
    alone = EF21Muon([wide], lr=1e-9)
    for _ in range(20):
        for parameter in (*layers, wide):
            parameter.grad = torch.eye(4, dtype=parameter.dtype)
        mixed.step()
        alone.step()
    for parameter in layers:
        assert (1 - parameter.diagonal()).min() > 0.01 and (1 - parameter.diagonal()).max() < 0.03
    assert (1 - wide.diagonal()).min() > 1e-8 and (1 - wide.diagonal()).max() < 3e-8


def test_vectors_and_matrices_of_one_shape_may_be_transposed_together():
    """(1, 5) as (d_in, d_out) is a matrix (5, 1), as is a vector of five entries."""
    layers = [nn.Parameter(torch.ones(1, 5)), nn.Parameter(torch.ones(5))]
    optimizer = EF21Muon([{"params": layers, "transposed": True}], lr=0.1)
    for parameter in layers:
        parameter.grad = torch.arange(5.0).view(parameter.shape)
    optimizer.step()
    assert torch.equal(layers[0].flatten(), layers[1])
