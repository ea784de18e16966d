"""States of one process: what they are of is checked before anything changes."""

import copy
import io
import pickle

import pytest
import torch
from cases import case
from one_layer import everything, layer, rest, take_steps
from torch import nn

from baselines import DeMo, Dion
from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import Quantize, TopK
from ef21_muon.norms import AdaptiveRadius, Sign

MAKE = {
    "top 20%": lambda p: EF21Muon(p, w2s=TopK(0.2)),
    "top 30%": lambda p: EF21Muon(p, w2s=TopK(0.3)),
    "back": lambda p: EF21Muon(p, w2s=TopK(0.2), s2w=TopK(0.2)),
    "ef14": lambda p: EF21Muon(p, w2s=TopK(0.2), feedback="ef14"),
    "local": lambda p: LocalSteps(EF21Muon(p, process_group=ALONE), sync_every=3, w2s=TopK(0.2)),
    "dion": lambda p: Dion([{"name": "hidden", "params": p}]),
    "demo": lambda p: DeMo([{"name": "hidden", "params": p}]),
    "sign_muon": lambda p: EF21Muon(p, lmo="workers", w2s=Quantize("sign@tensor")),
}


def trained(name, steps=4):
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    optimizer = MAKE[name](list(model.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
    return optimizer


def tensors(optimizer):
    return [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_its_own_state_is_taken(name, full):
    optimizer, other = trained(name), trained(name, steps=1)
    state = optimizer.full_state_dict() if full else optimizer.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    assert other.steps == 4
    assert all(map(torch.equal, tensors(optimizer), tensors(other)))


def test_the_state_of_anything_else_is_refused_before_anything_changes():
    line = r"^the state is of (method|feedback|lmo|w2s|s2w) "
    optimizers = {name: trained(name, steps=1) for name in MAKE}
    for of in MAKE:
        state = trained(of).state_dict()
        for name in MAKE.keys() - {of}:
            optimizer, before = optimizers[name], tensors(optimizers[name])
            with case(name, of), pytest.raises(ValueError, match=line):
                optimizer.load_state_dict(state)
            same = map(torch.equal, before, tensors(optimizer))
            assert optimizer.steps == 1 and all(same), (name, of)


@pytest.mark.parametrize("name", MAKE)
def test_a_part_of_a_state_is_refused(name):
    optimizer = trained(name)
    state = optimizer.state_dict()
    only_tables = {
        number: {key: {"rank0": one["rank0"]} for key, one in own.items()}
        for number, own in state["state"].items()
    }
    with pytest.raises(ValueError, match=r"^the state lacks what it is of, its counters and "):
        optimizer.load_state_dict(state | {"state": only_tables})
    for key in state:
        with pytest.raises(ValueError, match=r"^the state is damaged \(KeyError"):
            optimizer.load_state_dict({k: v for k, v in state.items() if k != key})
    for key in ("of", "counters", "generators"):
        part = copy.deepcopy(state)
        del rest(part)[key]
        with pytest.raises(ValueError, match=r"^the state is damaged \(KeyError"):
            optimizer.load_state_dict(part)
    with pytest.raises(ValueError, match=r"^the state is None, as full_state_dict\(\) gives it on"):
        optimizer.load_state_dict(None)


def sgd(p, **options):
    return torch.optim.SGD(p, **({"lr": 0.1, "momentum": 0.9} | options))


def muon(p, **options):
    return EF21Muon(p, process_group=ALONE, **options)


def apart(p, first, second):
    """Two inner optimizers, of a weight and of a bias."""
    return [first(p[:1]), second(p[1:])]


class Warmed(torch.optim.AdamW):
    """With an option of its own, which it keeps beside `defaults`."""

    def __init__(self, params, lr=0.1, warmup=10):
        super().__init__(params, lr=lr)
        self.warmup = warmup


# A state of the first is refused by the second, which differs as the third says.
UNLIKE = {
    "class": (
        lambda p: LocalSteps(torch.optim.AdamW(p)),
        lambda p: LocalSteps(sgd(p)),
        "method of inner 0 'torch.optim.adamw.AdamW' (here 'torch.optim.sgd.SGD')",
    ),
    "near class": (
        lambda p: LocalSteps(torch.optim.Adam(p)),
        lambda p: LocalSteps(torch.optim.NAdam(p)),
        "method of inner 0 'torch.optim.adam.Adam'",
    ),
    "class, of averaged gradients": (
        lambda p: AveragedGradients(torch.optim.RMSprop(p)),
        lambda p: AveragedGradients(torch.optim.Adagrad(p)),
        "method of inner 0 'torch.optim.rmsprop.RMSprop'",
    ),
    "option that is an attribute": (
        lambda p: LocalSteps(Warmed(p, warmup=5)),
        lambda p: LocalSteps(Warmed(p)),
        "warmup of inner 0 5 (here 10)",
    ),
    "order of inner optimizers": (
        lambda p: LocalSteps(apart(p, sgd, torch.optim.AdamW)),
        lambda p: LocalSteps(apart(p, torch.optim.AdamW, sgd)),
        "method of inner 0 'torch.optim.sgd.SGD'",
    ),
    "number of inner optimizers": (
        lambda p: LocalSteps(apart(p, sgd, sgd)),
        lambda p: LocalSteps(sgd(p)),
        "number of inner optimizers 2 (here 1)",
    ),
    "momentum": (
        lambda p: LocalSteps(sgd(p)),
        lambda p: LocalSteps(sgd(p, momentum=0.5)),
        "momentum of group 0 of inner 0 0.9 (here 0.5)",
    ),
    "betas": (
        lambda p: AveragedGradients(torch.optim.AdamW(p, betas=(0.8, 0.9))),
        lambda p: AveragedGradients(torch.optim.AdamW(p)),
        "betas of group 0 of inner 0 [0.8, 0.9] (here [0.9, 0.999])",
    ),
    "amsgrad": (
        lambda p: LocalSteps(torch.optim.AdamW(p, amsgrad=True)),
        lambda p: LocalSteps(torch.optim.AdamW(p)),
        "amsgrad of group 0 of inner 0 True (here False)",
    ),
    "momentum of an inner EF21Muon": (
        lambda p: LocalSteps(muon(p, momentum=0.8)),
        lambda p: LocalSteps(muon(p)),
        "momentum of group 0 of inner 0 0.8 (here 0.9)",
    ),
    "norm of an inner EF21Muon": (
        lambda p: LocalSteps(muon(p, norm=Sign())),
        lambda p: LocalSteps(muon(p)),
        "norm of group 0 of inner 0 'Sign(",
    ),
    "sync_every": (
        lambda p: LocalSteps(sgd(p), sync_every=3),
        lambda p: LocalSteps(sgd(p), sync_every={0: 3, 6: 2}),
        "every '3' (here '3, 2 from step 7')",
    ),
    "outer_lr": (
        lambda p: LocalSteps(sgd(p), outer_lr=0.7),
        lambda p: LocalSteps(sgd(p)),
        "outer_lr 0.7 (here 1.0)",
    ),
    "outer_momentum": (
        lambda p: LocalSteps(sgd(p), outer_momentum=0.7),
        lambda p: LocalSteps(sgd(p), outer_momentum=0.6),
        "outer_momentum 0.7 (here 0.6)",
    ),
    "nesterov": (
        lambda p: LocalSteps(sgd(p), outer_momentum=0.7, nesterov=False),
        lambda p: LocalSteps(sgd(p), outer_momentum=0.7),
        "nesterov False (here True)",
    ),
    "error_decay": (
        lambda p: LocalSteps(sgd(p), w2s=TopK(0.2), error_decay=0.5),
        lambda p: LocalSteps(sgd(p), w2s=TopK(0.2)),
        "error_decay 0.5 (here 1.0)",
    ),
    "sync_delay": (
        lambda p: LocalSteps(sgd(p), sync_every=6, sync_delay=1),
        lambda p: LocalSteps(sgd(p), sync_every=6, sync_delay=2),
        "sync_delay 1 (here 2)",
    ),
    "streaming": (
        lambda p: LocalSteps(sgd(p), sync_every=6, streaming=True),
        lambda p: LocalSteps(sgd(p), sync_every=6),
        "streaming True (here False)",
    ),
    "value format": (
        lambda p: LocalSteps(sgd(p), w2s=Quantize("normal2")),
        lambda p: LocalSteps(sgd(p), w2s=Quantize("normal3")),
        "w2s of group 0 'Quantize(values=Normal(count=1, block=row, width=2))' (here",
    ),
    "level of a compressor": (
        lambda p: LocalSteps(sgd(p), w2s=TopK(0.3)),
        lambda p: LocalSteps(sgd(p), w2s=TopK(0.300001)),
        "w2s of group 0 'TopK(fraction=0.3, values=Float32()",
    ),
    "rounding": (
        lambda p: EF21Muon(p, w2s=Quantize({"format": "natural", "rounding": "nearest"})),
        lambda p: EF21Muon(p, w2s=Quantize("natural")),
        "w2s of group 0 'Quantize(values=Natural(",
    ),
    "dtype": (
        lambda p: LocalSteps(sgd(p)),
        lambda p: LocalSteps(sgd([nn.Parameter(one.detach().bfloat16()) for one in p])),
        "shape of parameter 0 of group 0 '(8, 6) float32' (here '(8, 6) bfloat16'",
    ),
    "momentum of EF21Muon": (
        lambda p: EF21Muon(p, momentum=0.5),
        lambda p: EF21Muon(p),
        "momentum of group 0 0.5",
    ),
    "norm": (lambda p: EF21Muon(p, norm=Sign()), lambda p: EF21Muon(p), "norm of group 0 'Sign("),
    "radius": (
        lambda p: EF21Muon(p, radius=AdaptiveRadius(1, 2)),
        lambda p: EF21Muon(p),
        "radius of group 0 ",
    ),
    "weight_decay": (
        lambda p: EF21Muon(p, weight_decay=0.1),
        lambda p: EF21Muon(p),
        "weight_decay of group 0 0.1 (here 0.0)",
    ),
    "momentum kind": (
        lambda p: EF21Muon(p, momentum_kind="polyak"),
        lambda p: EF21Muon(p, momentum_kind="mvr"),
        "momentum_kind 'polyak' (here 'mvr')",
    ),
    "gamma": (
        lambda p: EF21Muon(p, gamma=0.1),
        lambda p: EF21Muon(p, gamma=0.2),
        "gamma 0.1 (here 0.2)",
    ),
    "values of dion": (
        lambda p: Dion([{"name": "hidden", "params": p}], values="bfloat16"),
        lambda p: Dion([{"name": "hidden", "params": p}], values="natural"),
        "values 'BFloat16()' (here 'Natural(",
    ),
    "k of demo": (
        lambda p: DeMo([{"name": "hidden", "params": p}], k=4),
        lambda p: DeMo([{"name": "hidden", "params": p}], k=2),
        "k 4 (here 2)",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_state_of_other_options_is_refused_before_anything_changes(name):
    make, make_other, difference = UNLIKE[name]
    model = layer()
    optimizer = make(list(model.parameters()))
    take_steps(model, optimizer, 7)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    its_model = layer()
    other = make_other(list(its_model.parameters()))
    before = everything(other)
    with pytest.raises(ValueError, match=r"^the state is of ") as refusal:
        other.load_state_dict(torch.load(file, weights_only=True))
    assert difference in str(refusal.value) and "\n" not in str(refusal.value)
    assert everything(other) == before and other.steps == 0


MAY_CHANGE = {
    "lr": (lambda p, old: LocalSteps(sgd(p, lr=0.1 if old else 0.2)), 0.1),
    "lr of EF21Muon": (lambda p, old: EF21Muon(p, lr=0.1 if old else 0.2), 0.1),
    "buckets": (lambda p, old: EF21Muon(p, lr=0.1, buckets=1 if old else 4), 0.1),
    "missing": (lambda p, old: EF21Muon(p, lr=0.1, missing_grad="error" if old else "zero"), 0.1),
    "server": (lambda p, old: EF21Muon(p, lr=0.1, server="rank0" if old else "sharded"), 0.1),
    "foreach": (lambda p, old: LocalSteps(sgd(p, foreach=bool(old))), 0.1),
    "seed": (lambda p, old: EF21Muon(p, lr=0.1, seed=int(old)), 0.1),
}


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_may_change_does(name):
    make, lr = MAY_CHANGE[name]
    model = layer()
    optimizer = make(list(model.parameters()), True)
    take_steps(model, optimizer, 3)
    other = make(list(layer().parameters()), False)
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [lr]


ROLLED_BACK = {
    **MAKE,
    "local, adamw": lambda p: LocalSteps(torch.optim.AdamW(p), sync_every=3, outer_momentum=0.5),
    "local, delay": lambda p: LocalSteps(sgd(p), sync_every=6, sync_delay=2, w2s=TopK(0.3)),
    "averaged": lambda p: AveragedGradients(torch.optim.AdamW(p), w2s=TopK(0.3)),
}


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_a_state_is_of_its_moment_and_brings_it_back_again_and_again(name):
    """Also while the optimizer that it was taken of steps on, and after it was loaded."""
    model = layer()
    optimizer = ROLLED_BACK[name](list(model.parameters()))
    take_steps(model, optimizer, 4)
    weights, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    ends = []
    for _ in range(3):
        take_steps(model, optimizer, 5, first=4)
        ends.append(copy.deepcopy(model.state_dict()))
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    for end in ends[1:]:
        assert all(map(torch.equal, ends[0].values(), end.values()))


def test_a_saved_state_is_as_large_as_what_it_holds():
    """Not as the tables that its layers are rows of."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(12)))
    optimizer = EF21Muon(model.parameters())
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert held <= len(pickle.dumps(optimizer.state_dict())) < 2 * held


CLEARED = {
    "cleared": lambda optimizer: optimizer.state.clear(),
    "replaced": lambda optimizer: setattr(optimizer, "state", {}),
    "of a parameter": lambda optimizer: optimizer.state.pop(next(iter(optimizer.state))),
    "a tensor": lambda optimizer: next(iter(optimizer.state.values())).update(
        {next(iter(next(iter(optimizer.state.values())))): torch.zeros(8, 6)}
    ),
}


WHO_AND_HOW = [
    *((name, "cleared") for name in ROLLED_BACK if name != "back"),
    *((name, how) for name in ("top 20%", "local, delay") for how in CLEARED),
]


@pytest.mark.parametrize(("name", "how"), dict.fromkeys(WHO_AND_HOW))
def test_a_state_that_was_cleared_or_replaced_is_refused_at_the_next_step(name, how):
    model = layer()
    optimizer = ROLLED_BACK[name](list(model.parameters()))
    take_steps(model, optimizer, 3)
    CLEARED[how](optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"of shape \(\d.* was cleared or replaced, which steps"):
        take_steps(model, optimizer, 1)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_hooks_are_called_as_torch_calls_them(name):
    model = layer()
    optimizer = ROLLED_BACK[name](list(model.parameters()))
    called = []
    optimizer.register_step_pre_hook(lambda one, args, kwargs: called.append("step"))
    optimizer.register_step_post_hook(lambda one, args, kwargs: called.append("stepped"))
    optimizer.register_state_dict_pre_hook(lambda one: called.append("state"))
    optimizer.register_state_dict_post_hook(lambda one, state: {**state, "note": len(called)})
    optimizer.register_load_state_dict_pre_hook(lambda one, state: called.append(state["note"]))
    optimizer.register_load_state_dict_post_hook(lambda one: called.append("loaded"))
    take_steps(model, optimizer, 1)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert called == ["step", "stepped", "state", 3, "loaded"]

    def of_other_options(one, state):
        state = copy.deepcopy(state)
        text = b'{"method": "Other", "rank": 0, "ranks": 1}'
        rest(state)["of"] = torch.tensor(list(text), dtype=torch.uint8)
        return state

    optimizer.register_load_state_dict_pre_hook(of_other_options)
    with pytest.raises(ValueError, match="the state is of method 'Other'"):
        optimizer.load_state_dict(state)
