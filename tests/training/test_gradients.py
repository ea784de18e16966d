"""What precision and compile do to a run's passes."""

import pytest
import torch
from omegaconf import OmegaConf
from silent import Silent

from model import GPT, GPTConfig
from training.config import compose, what_matters
from training.gradients import GradientComputation
from training.workers import RunError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def computation_of(precision="auto", compiled=False, device="cpu"):
    model = GPT(GPTConfig(layers=1, width=32, heads=2, context=16, vocab_size=64))
    torch.manual_seed(0)
    for parameter in model.parameters():  # also of those that begin as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return GradientComputation(
        model.to(device), Silent(), torch.device(device), precision, compiled
    )


def batch_on(device):
    tokens = torch.randint(64, (2, 4, 17), generator=torch.Generator().manual_seed(0)).to(device)
    return [(part[:, :-1], part[:, 1:]) for part in tokens]


def loss_and_dtype(computation, device):
    """The loss of a batch, its gradients, and of what dtypes a linear map's outputs were."""
    seen = set()
    expand = computation.raw_model.blocks[0].mlp.expand
    handle = expand.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    loss = computation.compute(batch_on(device))
    gradients = [parameter.grad for parameter in computation.raw_model.parameters()]
    windows = [(inputs, targets, targets.numel()) for inputs, targets in batch_on(device)]
    total, tokens = computation.loss_sum(windows)
    handle.remove()
    torch.testing.assert_close(total.float() / tokens, loss)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    return loss, gradients, seen


@pytest.mark.parametrize("device", DEVICES)
def test_linear_maps_have_the_precision_asked_for(device):
    default = torch.bfloat16 if device == "cuda" else torch.float32
    losses, gradients = {}, {}
    kinds = {"auto": default, "float32": torch.float32, "bfloat16": torch.bfloat16}
    for precision, dtype in kinds.items():
        computation = computation_of(precision, device=device)
        losses[precision], gradients[precision], seen = loss_and_dtype(computation, device)
        assert seen == {dtype}
    same, other = ("bfloat16", "float32") if device == "cuda" else ("float32", "bfloat16")
    assert losses["auto"] == losses[same] != losses[other]
    for one, half in zip(gradients["float32"], gradients["bfloat16"], strict=True):
        assert 0 < (one - half).norm() < 0.02 * one.norm()


@pytest.mark.parametrize(
    ("device", "asked", "compiled"),
    [
        ("cpu", "auto", False),
        ("cpu", False, False),
        ("cpu", True, True),
        pytest.param("cuda", "auto", True, marks=pytest.mark.cuda),
        pytest.param("cuda", False, False, marks=pytest.mark.cuda),
    ],
)
def test_passes_are_compiled_where_asked_for(device, asked, compiled, monkeypatch):
    """Traced, but with the operations that are there: to the same numbers."""
    own, calls = torch.compile, []

    def traced(model, dynamic):
        calls.append((model, dynamic))
        return own(model, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    plain, other = (
        computation_of("float32", device=device),
        computation_of("float32", asked, device),
    )
    assert calls == [(other.raw_model, False)] * compiled
    assert plain.compute(batch_on(device)) == pytest.approx(other.compute(batch_on(device)))


def test_cpus_without_a_compiler_are_told_before_training(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match=r"no-such-compiler was not found: .* or give compile=false"):
        computation_of(compiled=True)
    computation_of(compiled="auto")


def test_only_what_changes_numbers_is_told_apart(small):
    def matters(*overrides):
        return what_matters(OmegaConf.to_container(compose((*small, *overrides)).config))

    before = matters() | {"compile": True}
    assert matters("precision=auto") == matters("compile=true") == matters("compile=auto") == before
    assert matters("precision=bfloat16") == before | {"precision": "bfloat16"}
    assert "precision" not in before
