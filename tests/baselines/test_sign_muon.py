"""SignMuon in one process: what it sends, is called, and refuses; its steps: test_recovered.py."""

import pytest
import torch
from a_round import a_round
from torch.nn import Parameter

from ef21_muon import EF21Muon
from ef21_muon.compressors import Quantize
from ef21_muon.norms import AdaptiveRadius, Sign, Spectral
from model import GPT
from training.config import build, compose
from training.method import build_optimizer, run_label

LR = 0.02
IN_THE_STUDY = (
    "optimizer=sign_muon",
    "compressor@w2s=sign",
    "w2s.values=sign@tensor",
    "+compressor@norm.embedding.w2s=identity",
)


def sign_muon(params, **options):
    return EF21Muon(
        params, lmo="workers", **{"feedback": "none", "w2s": Quantize("sign@tensor")} | options
    )


def step(optimizer, parameter, seed=0):
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def test_a_step_is_signs_of_one_size_against_the_orthogonal_factor():
    """Which is as long as 0.8 of it, for matrices of Gaussian entries."""
    parameter = Parameter(torch.zeros(64, 64))
    norm = Spectral("svd")
    optimizer = sign_muon([parameter], lr=LR, norm=norm)
    step(optimizer, parameter)
    muon = LR * norm.lmo(parameter.grad)
    torch.testing.assert_close(parameter.detach(), muon.abs().mean() * muon.sign())
    length = float(parameter.detach().norm() / muon.norm())
    assert length == pytest.approx((2 / torch.pi) ** 0.5, abs=0.02)
    assert a_round(optimizer).w2s_bytes == 64 * 64 // 8 + 4  # a bit an entry, and a scale


def test_with_feedback_steps_come_near_a_direction_that_stays():
    parameter = Parameter(torch.zeros(24, 16))
    norm = Spectral("svd")
    optimizer = sign_muon([parameter], lr=LR, norm=norm, feedback="ef21")
    off = []
    for _ in range(40):
        before = parameter.detach().clone()
        step(optimizer, parameter)
        muon = LR * norm.lmo(parameter.grad)
        off.append(float((parameter.detach() - before - muon).norm() / muon.norm()))
    assert off[0] > 0.5
    assert off[-1] < 0.2


def test_in_the_study_the_embedding_is_sent_whole():
    config = compose((*IN_THE_STUDY, "optimizer.feedback=ef21")).config
    model = GPT(build(config.model, "model"))
    optimizer = build_optimizer(config, model)
    assert run_label(optimizer) == "EF21-SignMuon, sign@tensor, embedding identity"
    named = dict(model.named_parameters())
    hidden = [parameter for name, parameter in named.items() if name.startswith("blocks")]
    whole = sum(p.numel() for p in named.values()) - sum(p.numel() for p in hidden)
    signs = sum(p.numel() // 8 + 4 for p in hidden)
    assert a_round(optimizer).w2s_bytes == 4 * whole + signs


@pytest.mark.parametrize(
    "group", [{"radius": AdaptiveRadius(1, 0)}, {"lmo_feedback": True}], ids=lambda g: next(iter(g))
)
def test_what_needs_an_lmo_at_the_servers_is_refused(group):
    with pytest.raises(ValueError, match=r"with lmo='workers', .*: give a number, and False$"):
        sign_muon([{"params": [Parameter(torch.zeros(3, 4))], "norm": Sign(), **group}])
