"""clip_grad_norm: a worker's gradient against torch's own clipping, for every kind of step."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from host_sync import NoHostSync
from silent import Silent
from torch.nn.utils import clip_grad_norm_, get_total_norm

from baselines import AdamW, DeMo, Dion, Muon
from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.compressors import Quantize, TopK
from model import GPT, GPTConfig
from training.gradients import GradientComputation

MAX_NORM = 0.1
METHODS = {
    "ef21": lambda named: EF21Muon(named, w2s=TopK(0.2)),
    **{
        kind: lambda named, kind=kind: EF21Muon(named, w2s=TopK(0.2), momentum_kind=kind, gamma=0.5)
        for kind in ("mvr", "hessian")
    },
    "local adamw": lambda named: LocalSteps(torch.optim.AdamW(named), sync_every=2, w2s=TopK(0.2)),
    "local sgd": lambda named: LocalSteps(torch.optim.SGD(named, lr=0.1), sync_every=2),
    "local muon": lambda named: LocalSteps(EF21Muon(named, process_group=ALONE), sync_every=2),
    "signs": lambda named: EF21Muon(
        named, lmo="workers", feedback="none", w2s=Quantize("sign@tensor")
    ),
    "demo": DeMo,
    "dion": Dion,
    "muon": Muon,
    "adamw": AdamW,
    "greedylore": partial(Muon, hook="greedylore", rank=2, refresh_every=2),
}


def new_model():
    model = GPT(GPTConfig(layers=1, width=32, heads=2, context=16, vocab_size=64), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # also of those that begin as zeros
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(step, passes=2):
    tokens = torch.randint(64, (passes, 4, 17), generator=torch.Generator().manual_seed(step))
    return [(part[:, :-1], part[:, 1:]) for part in tokens]


def computation_of(optimizer, model, max_norm=None):
    return GradientComputation(model, optimizer, torch.device("cpu"), "float32", False, max_norm)


def gradients_of(model):
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_gradients_that_torch_clips(process_group, method):
    """Of several passes, and of both gradients where a step takes two of a batch."""
    found = []
    for max_norm in (MAX_NORM, None):
        model = new_model()
        optimizer = METHODS[method]([{"params": list(model.named_parameters()), "name": "hidden"}])
        passes, norms = computation_of(optimizer, model, max_norm), []

        def gradient(batch, passes=passes, clips=max_norm is None, norms=norms):
            loss = passes.compute(batch)
            norms.append(get_total_norm(gradients_of(passes.raw_model)))
            if clips:
                clip_grad_norm_(passes.raw_model.parameters(), MAX_NORM)
            return loss

        for step in range(4):
            if passes.needs_closure:
                optimizer.step(partial(gradient, batch_of(step)))
            else:
                gradient(batch_of(step))
                optimizer.step()
        found.append(flat(model))
        if max_norm:
            assert all(norm <= MAX_NORM * (1 + 1e-5) for norm in norms)
        else:
            assert all(norm > MAX_NORM for norm in norms)
            assert len(norms) == (7 if passes.needs_closure else 4)
    distance = (found[0] - found[1]).norm() / (found[1] - flat(new_model())).norm()
    assert distance < (1e-2 if method in ("signs", "demo") else 1e-4)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("max_norm", [1e-4, MAX_NORM, 1e9])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_gradient_of_all_passes_is_clipped_once(max_norm, passes):
    model, reference = new_model(), new_model()
    computation_of(Silent(), model, max_norm).compute(batch_of(0, passes))
    computation_of(Silent(), reference).compute(batch_of(0, passes))
    if max_norm == 1e9:
        assert all(map(torch.equal, gradients_of(model), gradients_of(reference)))
    clip_grad_norm_(reference.parameters(), max_norm)
    for found, expected in zip(gradients_of(model), gradients_of(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_left_to_be_named(value):
    model, reference = new_model(), new_model()
    name = "blocks.0.mlp.expand.weight"
    handle = model.get_parameter(name).register_hook(lambda grad: torch.full_like(grad, value))
    optimizer = EF21Muon(model.named_parameters())
    computation_of(optimizer, model, MAX_NORM).compute(batch_of(0, 1))
    computation_of(Silent(), reference).compute(batch_of(0, 1))
    handle.remove()
    for (own, parameter), its in zip(
        model.named_parameters(), gradients_of(reference), strict=True
    ):
        assert own == name or torch.equal(parameter.grad, its)
    optimizer.step()
    with pytest.raises(
        FloatingPointError, match=f"the gradient of {name} was not finite at step 1"
    ):
        optimizer.check_finite()


def test_a_rank_of_several_does_not_clip_its_own_part():
    """Their mesh does, once it has averaged over them: tests/ef21_muon/test_hierarchy."""
    optimizer = Silent(mesh=SimpleNamespace(max_norm=None))
    model, reference = new_model(), new_model()
    computation_of(optimizer, model, MAX_NORM).compute(batch_of(0))
    computation_of(Silent(), reference).compute(batch_of(0))
    assert optimizer.mesh.max_norm == MAX_NORM
    assert all(map(torch.equal, gradients_of(model), gradients_of(reference)))


def test_it_does_not_wait_for_the_device():
    passes, batch = computation_of(Silent(), new_model(), MAX_NORM), batch_of(0)
    with NoHostSync():
        passes.compute(batch)
