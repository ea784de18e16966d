"""Weights that are stored as (d_in, d_out), and convolutions: norms see (d_out, d_in)."""

import copy

import pytest
import torch
from torch import nn

from baselines import DeMo, Dion
from ef21_muon import ALONE, EF21Muon, LocalSteps, param_groups
from ef21_muon.compressors import Quantize, RankK, TopK
from ef21_muon.norms import AdaptiveRadius, Blocks, ColumnNorm, RowNorm, Sign, Spectral
from ef21_muon.norms.presets import PRESETS


class Conv1D(nn.Module):
    """A linear layer in the form of transformers' Conv1D."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Subclassed(Conv1D):
    pass


class Block(nn.Module):
    """Its weights as `kind` stores them; the second is wider than tall."""

    def __init__(self, kind):
        super().__init__()
        linear = kind is nn.Linear
        self.expand = kind(6, 20) if linear else kind(20, 6)
        self.project = kind(20, 6) if linear else kind(6, 20)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.project(torch.tanh(self.expand(x))))


def twins(kind):
    """The same function, with weights of linear layers and with those of `kind`."""
    torch.manual_seed(0)
    linear, other = Block(nn.Linear), Block(kind)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            its = linear.get_parameter(name)
            parameter.copy_(its if its.shape == parameter.shape else its.T)
    return linear, other


def groups(model, **options):
    return param_groups(model, roles={"last.weight": "embedding"}, **options)


def with_rule(**rule):
    def make(its_groups):
        return EF21Muon([{**group, **rule} for group in its_groups], lr=0.05)

    return make


def local(its_groups):
    inner = EF21Muon(its_groups, lr=0.05, process_group=ALONE)
    return LocalSteps(inner, sync_every=3, w2s=RankK(0.5), outer_momentum=0.5)


OPTIMIZERS = {
    "spectral": with_rule(norm=Spectral("svd")),
    "muon's": with_rule(norm=Spectral("svd", scaling="muon"), weight_decay=0.1, nesterov=True),
    "columns": with_rule(norm=ColumnNorm()),
    "rows": with_rule(norm=RowNorm()),
    "signs": with_rule(norm=Sign()),
    "low rank": with_rule(w2s=RankK(0.5, "natural7"), norm=Spectral("svd")),
    "rows' own scales": with_rule(w2s=Quantize("int5"), s2w=Quantize("int8"), norm=Spectral("svd")),
    "top k back": with_rule(w2s=TopK(0.5), s2w=TopK(0.5)),
    "local": local,
    "dion": lambda its_groups: Dion(its_groups, lr=0.05, rank_fraction=0.5),
    "demo": lambda its_groups: DeMo(its_groups, lr=0.05, k=4, chunk=4),
}


def train(model, optimizer, steps=7):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, Conv1D) for name in OPTIMIZERS), ("muon's", Subclassed)]
)
def test_a_layer_that_is_stored_transposed_takes_the_steps_of_a_linear_one(name, kind):
    linear, other = twins(kind)
    before = copy.deepcopy(other.state_dict())
    for model in (linear, other):
        optimizer = OPTIMIZERS[name](groups(model))
        train(model, optimizer)
        if name == "local":
            optimizer.final_sync()
    for key, its in linear.state_dict().items():
        ours = other.state_dict()[key]
        assert not torch.equal(ours, before[key])
        ours = ours if ours.shape == its.shape else ours.T
        torch.testing.assert_close(ours, its, rtol=0, atol=1e-3)  # steps of 0.05


def test_what_workers_agree_on_is_stored_as_the_model_stores_it():
    linear, other = twins(Conv1D)
    shared = []
    for model in (linear, other):
        optimizer = local(groups(model))
        train(model, optimizer, steps=5)
        own = model.expand.weight.detach().clone()
        with optimizer.global_params():
            shared.append(model.expand.weight.detach().clone())
        assert torch.equal(own, model.expand.weight) and not torch.equal(own, shared[-1])
    torch.testing.assert_close(shared[1].T, shared[0], rtol=0, atol=1e-3)


def test_other_layers_can_be_said_to_be_transposed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.up = nn.Parameter(torch.zeros(4, 16))

    model = Experts()
    with pytest.raises(ValueError) as error:
        param_groups(model)
    assert str(error.value) == (
        "the role of up (4, 16) is unclear: give param_groups roles={'up': 'hidden'}, or "
        "'embedding' for a table"
        " or an output head, and if its dimensions are not (d_out, d_in) as torch.nn.Linear has "
        "them, transposed=['up'] too"
    )
    for given, shape in (((), (4, 16)), (["u*"], (16, 4))):
        its_groups = param_groups(model, roles={"up": "hidden"}, transposed=given)
        shapes = [batch.shape for batch in EF21Muon(its_groups).batches if batch.names == ["up"]]
        assert shapes == [shape]
    with pytest.raises(ValueError, match=r"^transposed has 'down', which matches no trained"):
        param_groups(model, roles={"up": "hidden"}, transposed=["down"])


def step_of(layer, gradient, preset="scion", **rule):
    """What a step changes of a layer with such a gradient, by groups of `param_groups`."""
    its_groups = param_groups(layer, preset, roles={"weight": "hidden"})
    optimizer = EF21Muon([{**group, **rule} for group in its_groups], lr=0.1)
    before = layer.weight.detach().clone()
    layer.weight.grad = gradient.clone()
    optimizer.step()
    return layer.weight.detach() - before


KERNELS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}
KERNELS |= {3: (nn.Conv3d, nn.ConvTranspose3d)}


@pytest.mark.parametrize("preset", ["scion", "muon", "gluon"])
@pytest.mark.parametrize("dims", KERNELS)
@pytest.mark.parametrize(("d_in", "d_out"), [(6, 10), (10, 6)])
def test_a_transposed_convolution_takes_the_step_of_a_convolution(d_in, d_out, dims, preset):
    """Of one of its sizes, whose weights are stored the other way round."""
    kind, transposed_kind = KERNELS[dims]
    layer, transposed = (one(d_in, d_out, 3, bias=False) for one in (kind, transposed_kind))
    gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    expected = step_of(layer, gradient, preset)
    found = step_of(transposed, gradient.transpose(0, 1), preset)
    torch.testing.assert_close(found.transpose(0, 1), expected)


GROUPED = [
    *((kind, 6, 9, 3) for kind in KERNELS[2]),
    *((kind, 8, 4, 2) for kind in (*KERNELS[1], *KERNELS[2])),
    *((kind, 8, 8, 8) for kind in (*KERNELS[1], *KERNELS[2], *KERNELS[3])),  # depthwise
    *((kind, 4, 8, 4) for kind in KERNELS[2]),
]


def blocks(weight, groups):
    """A grouped convolution's weight as that of the whole linear map, which is zero elsewhere."""
    rows = weight.split(len(weight) // groups)
    whole = weight.new_zeros(len(weight), groups * weight.shape[1], *weight.shape[2:])
    for place, block in enumerate(rows):
        columns = slice(place * weight.shape[1], (place + 1) * weight.shape[1])
        whole[place * len(block) : (place + 1) * len(block), columns] = block
    return whole


GROUPED_BY_PRESET = [
    *(("scion", *one) for one in GROUPED),
    *(("muon", *one) for one in GROUPED[::3]),
    *(("gluon", *one) for one in GROUPED[1::3]),
]


@pytest.mark.parametrize(("preset", "kind", "d_in", "d_out", "groups"), GROUPED_BY_PRESET)
def test_a_grouped_convolution_takes_the_step_of_the_linear_map_that_it_is(
    preset, kind, d_in, d_out, groups
):
    """A convolution without groups, all of whose weights between groups stay zero."""
    layer = kind(d_in, d_out, 3, groups=groups, bias=False)
    whole = kind(d_in, d_out, 3, bias=False)
    gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    exact = {"norm": Spectral("svd", scaling="muon" if preset == "muon" else "scion")}
    rules = {**PRESETS[preset], "hidden": PRESETS[preset]["hidden"] | exact}
    scaling = {"conv_scaling": preset == "scion"}
    found = step_of(layer, gradient, rules, **scaling)
    expected = step_of(whole, blocks(gradient, groups), rules, **scaling)
    assert found.norm() > 0
    torch.testing.assert_close(blocks(found, groups), expected)
    assert step_of(layer, gradient, preset).norm().item() == pytest.approx(
        found.norm().item(), rel=0.35
    )


def test_groups_of_a_convolution_are_apart_from_other_layers():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 2), nn.ConvTranspose2d(4, 4, 2, groups=2),
    )  # fmt: skip
    hidden = [group for group in param_groups(model) if group["name"] == "hidden"]
    names = [[name for name, _ in group["params"]] for group in hidden]
    assert names == [
        ["0.weight", "3.weight"],
        ["1.weight"],
        ["2.weight"],
        ["4.weight"],
        ["5.weight"],
    ]
    assert all(group["conv_scaling"] for group in hidden)
    signs = param_groups(model, {"hidden": {"norm": Sign()}, "vector": {}})
    assert [type(group["norm"]) for group in signs if "norm" in group] == 2 * [Sign]
    for norm in (hidden[1]["norm"], hidden[4]["norm"]):
        found = norm.init_(torch.empty(3, 8, 8 * 9))
        torch.testing.assert_close(norm.dual(found), -(found * norm.exact().lmo(found)).sum((1, 2)))
        assert norm.cost(8, 72) > 0


def test_lmo_feedback_and_signs_work_on_groups():
    for options in ({"lmo_feedback": True}, {"s2w": TopK(0.5)}, {"radius": AdaptiveRadius(0.1, 1)}):
        model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ConvTranspose2d(6, 4, 3, groups=2))
        optimizer = EF21Muon([{**g, **options} for g in param_groups(model)], w2s=RankK(0.5))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.check_finite()
        for old, new in zip(before, model.parameters(), strict=True):
            assert new.isfinite().all() and not torch.equal(old, new)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_blocks_is_a_whole_one(count):
    with pytest.raises(ValueError, match=f"^Blocks got count={count}: give at least 1 block$"):
        Blocks(Spectral(), count)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 10, 5),
        nn.Conv2d(6, 10, 3),
        nn.Conv2d(6, 10, 1),
        nn.Conv3d(3, 4, 2),
    ],
)
def test_a_convolution_takes_scions_step(layer):
    """sqrt(d_out / d_in) / k of the orthogonal factor, with kernels of k entries.

    SpectralConv of LIONS-EPFL/scion, which has it for one and two dimensions.
    """
    its_groups = param_groups(layer)
    for group in its_groups:
        if group["name"] == "hidden":
            group["norm"] = Spectral("svd")
    optimizer = EF21Muon(its_groups, lr=0.1)
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 6 if layer.weight.ndim < 5 else 3, *[8] * (layer.weight.ndim - 2)))
    layer.weight.grad = torch.randn(layer.weight.shape)
    layer.bias.grad = torch.zeros_like(layer.bias)
    optimizer.step()
    d_out, d_in, *kernel = layer.weight.shape
    u, _, v = torch.linalg.svd(layer.weight.grad.double().flatten(1), full_matrices=False)
    length = 0.1 * (d_out / d_in) ** 0.5 / torch.Size(kernel).numel()
    expected = before - length * (u @ v).float().view_as(before)
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_kernels_of_different_size_are_apart_where_their_matrices_have_one_shape():
    model = nn.Sequential(nn.Conv2d(18, 8, 1), nn.Conv2d(2, 8, 3))
    optimizer = EF21Muon(param_groups(model), lr=1.0)
    before = [layer.weight.detach().clone() for layer in model]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[0].weight.grad.normal_(generator=torch.Generator().manual_seed(0))
    model[1].weight.grad.copy_(model[0].weight.grad.view_as(model[1].weight))
    optimizer.step()
    one, nine = (
        m.weight.detach().flatten(1) - b.flatten(1) for m, b in zip(model, before, strict=True)
    )
    torch.testing.assert_close(one, 3 * nine)
