"""What a user of torch expects: a model as parameters, specs as compressors, momentum, warnings."""

import copy
import gc
import warnings

import pytest
import torch
from run import ROOT, script
from torch import nn

import ef21_muon
from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps, param_groups
from ef21_muon.compressors import RankK, TopK
from ef21_muon.norms import BiasRMS, Sign, Spectral

MIDDLE = "lm_head.weight"


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 16))


def trained(model, optimizer, steps=3):
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randint(16, (5,))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def silent(make):
    """What is made without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


def test_a_model_gives_its_layers_the_norms_of_their_roles():
    """The first linear layer is hidden, the table and the last layer, which has its shape, not."""
    model, other = model_of(), model_of()
    model[3] = nn.Linear(8, 16)
    optimizer = silent(lambda: EF21Muon(nn.Sequential(model[0], model[1], model[3])))
    norms = {
        name: group["norm"] for group in optimizer.param_groups for name in group["param_names"]
    }
    assert {name: type(norm) for name, norm in norms.items()} == {
        **{"0.weight": Sign, "1.weight": Spectral, "2.weight": Sign},
        **{"1.bias": BiasRMS, "2.bias": BiasRMS},
    }
    rules = {"roles": {"3.weight": "embedding"}}
    groups = silent(lambda: EF21Muon(param_groups(other, **rules), w2s="topk:0.2", seed=3))
    assert [group["name"] for group in groups.param_groups] == ["embedding", "hidden", "vector"]


def test_a_model_is_its_groups_bit_for_bit():
    first, second = (nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    options = {"w2s": "topk:0.3", "momentum": 0.7, "seed": 5}
    ours = trained(first, EF21Muon(first, **options))
    assert torch.equal(ours, trained(second, EF21Muon(param_groups(second), **options)))


@pytest.mark.parametrize("option", [{"norm": Sign()}, {"radius": 2.0}])
def test_a_norm_beside_a_model_is_refused(option):
    with pytest.raises(ValueError, match=r"not allowed with a model, whose roles have their own"):
        EF21Muon(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16)), **option)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"wte.weight": (32, 32)}, "wte.weight (32, 32) (an embedding or head)"),
        ({"h.0.weight": (8, 8), MIDDLE: (8, 8)}, "lm_head.weight (8, 8) (an embedding or head)"),
        ({"h.0.weight": (512, 16)}, "h.0.weight (512, 16) (an embedding or head)"),
        ({"h.0.bias": (8,)}, "h.0.bias (8,) (a bias or gain)"),
        ({"h.0.weight": (8, 8), "h.1.weight": (24, 8), "header.weight": (8, 32)}, None),
        ({"conv.weight": (8, 4, 3, 3)}, None),
    ],
)
def test_bare_parameters_that_are_no_hidden_matrices_warn_once(shapes, named):
    pairs = [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    if named is None:
        silent(lambda: EF21Muon(pairs))
    else:
        with pytest.warns(UserWarning, match="no norm is given, and") as warned:
            EF21Muon(pairs)
        assert len(warned) == 1 and named in str(warned[0].message)
        assert warned[0].filename == __file__
    for given in (pairs, [{"params": pairs, "norm": Sign()}]):
        norm = {"norm": Spectral()} if given is pairs else {}
        silent(lambda given=given, norm=norm: EF21Muon(given, **norm))


def test_parameters_without_names_are_numbered_in_the_warning():
    groups = [
        {"params": [nn.Parameter(torch.randn(8, 8))]},
        {"params": nn.Parameter(torch.ones(4))},
    ]
    with pytest.warns(UserWarning, match=r"parameter 1 \(4,\) \(a bias or gain\)"):
        EF21Muon(groups)


@pytest.mark.parametrize("spec", ["rank:0.4:natural", "topk:0.3"])
def test_a_spec_is_its_compressor_bit_for_bit(spec):
    made = {"rank:0.4:natural": RankK(0.4, "natural"), "topk:0.3": TopK(0.3)}[spec]

    def through(w2s, kind):
        torch.manual_seed(0)
        layer = nn.Linear(16, 16, bias=False)
        inner = torch.optim.SGD(layer.parameters(), lr=0.1)
        optimizer = {
            "ef21": lambda: EF21Muon([{"params": layer.weight, "w2s": w2s}], s2w=w2s),
            "averaged": lambda: AveragedGradients(inner, w2s=w2s),
            "local": lambda: LocalSteps(inner, sync_every=1, w2s=w2s, s2w=w2s),
        }[kind]()
        for _ in range(3):
            layer(torch.ones(16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert repr(optimizer.rules[0]["w2s"]) == spec
        return layer.weight

    for kind in ("ef21", "averaged", "local"):
        assert torch.equal(through(spec, kind), through(made, kind))


def test_what_is_wrong_with_a_spec_is_said_with_the_option_and_the_group():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    with pytest.raises(ValueError, match=r"^w2s='ranks:0\.1' is not a compressor: choose from"):
        EF21Muon(model, w2s="ranks:0.1")
    groups = param_groups(model)
    groups[1]["s2w"] = "topk:2"
    with pytest.raises(ValueError, match=r"^s2w='topk:2' is not allowed: .* \(group vector\)"):
        EF21Muon(groups)


def test_schedulers_of_torch_cycle_the_momentum():
    model = nn.Linear(8, 8, bias=False)
    optimizer = EF21Muon(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    seen = []
    for _ in range(5):
        model(torch.ones(8)).sum().backward()
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["momentum"])
    assert min(seen) == pytest.approx(0.85) and max(seen) <= 0.95


def test_groups_that_a_scheduler_has_written_into_build_another_optimizer():
    layer = nn.Linear(8, 8, bias=False)
    optimizer = EF21Muon(layer.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    EF21Muon(optimizer.param_groups)
    wrong = [{"params": layer.parameters(), "momentun": 0.5}]
    with pytest.raises(ValueError, match=r"a group has no 'momentun': did you mean 'momentum'\?"):
        EF21Muon(wrong)


def local(steps, **options):
    layer = nn.Linear(4, 4)
    inner = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer = LocalSteps(inner, sync_every=3, **options)
    trained_by(layer, optimizer, steps)
    return optimizer


def trained_by(layer, optimizer, steps):
    for _ in range(steps):
        layer(torch.ones(4)).sum().backward()
        optimizer.step()


def let_go(optimizer):
    """Drop the last reference, also of cycles."""
    held = [optimizer]
    del optimizer
    held.clear()
    gc.collect()


UNSENT = "the last {} local steps were never sent"


@pytest.mark.parametrize(
    ("steps", "options", "left"),
    [(0, {}, 0), (3, {}, 0), (4, {}, 1), (5, {"streaming": True}, 2), (3, {"sync_delay": 1}, 3)],
)
def test_steps_that_were_never_sent_are_warned_of(steps, options, left):
    if left:
        with pytest.warns(UserWarning, match=UNSENT.format(left)):
            let_go(local(steps, **options))
    else:
        silent(lambda: let_go(local(steps, **options)))


def test_steps_that_are_sent_or_saved_are_not_warned_of():
    def synced():
        optimizer = local(4)
        optimizer.final_sync()
        let_go(optimizer)

    def saved():
        optimizer = local(4)
        state = optimizer.state_dict()
        other = local(5)
        other.load_state_dict(state)
        let_go(optimizer), let_go(copy.deepcopy(other)), let_go(other)

    silent(synced)
    silent(saved)


SCRIPT = """
import sys, torch
from ef21_muon import LocalSteps
layer = torch.nn.Linear(4, 4)
optimizer = LocalSteps(torch.optim.SGD(layer.parameters(), lr=0.1), sync_every=3)
for _ in range(4):
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
exec(sys.argv[1])
"""


def test_a_script_that_ends_with_unsent_steps_warns(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "ends.py").write_text(SCRIPT)
    ends = {"": 0, "optimizer.final_sync()": 0, "raise RuntimeError('other')": 1}
    said = [script(tmp_path / "ends.py", end, expect=n).stderr for end, n in ends.items()]
    assert [UNSENT.format(1) in errors for errors in said] == [True, False, False]
    assert "RuntimeError: other" in said[2]


def test_names_of_the_library_do_not_shadow_those_of_torch():
    assert not set(ef21_muon.__all__) & (set(dir(nn)) | set(dir(torch)))
    assert {"EF21Muon", "LocalSteps", "norms", "compressors", "values"} <= set(ef21_muon.__all__)
    assert all(hasattr(ef21_muon, name) for name in ef21_muon.__all__)


def test_an_inner_optimizer_of_a_model_is_given_alone():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    optimizer = LocalSteps(EF21Muon(model, process_group=ALONE), sync_every=2, w2s="sign")
    trained(model, optimizer, 2)
    assert optimizer.round == 1
