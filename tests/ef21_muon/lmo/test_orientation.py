"""Weights that are stored as (d_in, d_out), and convolutions: norms see (d_out, d_in)."""

import copy

import pytest
import torch
from torch import nn

from baselines import DeMo, Dion
from ef21_muon import (
    ALONE,
    ColumnNorm,
    Dense,
    EF21Muon,
    LocalSteps,
    RankK,
    RowNorm,
    Sign,
    Spectral,
    TopK,
    param_groups,
)


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
    return LocalSteps(inner, every=3, w2s=RankK(0.5), outer_momentum=0.5)


OPTIMIZERS = {
    "spectral": with_rule(norm=Spectral("svd")),
    "muon's": with_rule(norm=Spectral("svd", scaling="muon"), weight_decay=0.1, nesterov=True),
    "columns": with_rule(norm=ColumnNorm()),
    "rows": with_rule(norm=RowNorm()),
    "signs": with_rule(norm=Sign()),
    "low rank": with_rule(w2s=RankK(0.5, "natural7"), norm=Spectral("svd")),
    "rows' own scales": with_rule(w2s=Dense("int5"), s2w=Dense("int8"), norm=Spectral("svd")),
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


@pytest.mark.parametrize("kind", [Conv1D, Subclassed])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_that_is_stored_transposed_takes_the_steps_of_a_linear_one(name, kind):
    linear, other = twins(kind)
    before = copy.deepcopy(other.state_dict())
    for model in (linear, other):
        optimizer = OPTIMIZERS[name](groups(model))
        train(model, optimizer)
        if name == "local":
            optimizer.finish()
    for key, its in linear.state_dict().items():
        ours = other.state_dict()[key]
        assert not torch.equal(ours, before[key])
        ours = ours if ours.shape == its.shape else ours.T
        torch.testing.assert_close(ours, its, rtol=0, atol=1e-3)  # steps of 0.05


def test_what_workers_agree_on_is_stored_as_the_model_stores_it():
    linear, other = twins(Conv1D)
    agreed = []
    for model in (linear, other):
        optimizer = local(groups(model))
        train(model, optimizer, steps=5)
        own = model.expand.weight.detach().clone()
        with optimizer.agreed():
            agreed.append(model.expand.weight.detach().clone())
        assert torch.equal(own, model.expand.weight) and not torch.equal(own, agreed[-1])
    torch.testing.assert_close(agreed[1].T, agreed[0], rtol=0, atol=1e-3)


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
        "the role of up (4, 16) is unclear: pass roles={'up': 'hidden'}, or 'embedding' for a table"
        " or an output head, and if its dimensions are not (d_out, d_in) as torch.nn.Linear has "
        "them, transposed=['up'] too"
    )
    for given, shape in (((), (4, 16)), (["u*"], (16, 4))):
        its_groups = param_groups(model, roles={"up": "hidden"}, transposed=given)
        shapes = [batch.shape for batch in EF21Muon(its_groups).batches if batch.names == ["up"]]
        assert shapes == [shape]
    with pytest.raises(ValueError, match=r"^transposed has 'down', which matches no trained"):
        param_groups(model, roles={"up": "hidden"}, transposed=["down"])


def test_a_transposed_convolution_can_be_said_to_be_one():
    model = nn.ConvTranspose2d(3, 8, 5)
    its_groups = param_groups(model, roles={"weight": "hidden"}, transposed=["weight"])
    optimizer = EF21Muon(its_groups, lr=1.0)
    assert optimizer.batches[0].shape == (8, 75)
    before = model.weight.detach().clone()
    model(torch.randn(1, 3, 4, 4)).square().sum().backward()
    gradient = model.weight.grad.transpose(0, 1).reshape(8, 75)
    optimizer.step()
    step = (model.weight.detach() - before).transpose(0, 1).reshape(8, 75)
    torch.testing.assert_close(step, Spectral().lmo(gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 10, 5),
        nn.Conv2d(6, 10, 3),
        nn.Conv2d(6, 9, 3, groups=3),
        nn.Conv2d(6, 10, 1),
        nn.Conv3d(3, 4, 2),
    ],
)
def test_a_convolution_takes_scions_step(layer):
    """sqrt(d_out / d_in) / k of the orthogonal factor, with kernels of k entries; d_in a group's.

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
