"""Numbers that come as tensors or NumPy's: a learning rate stays a tensor, as in torch's own."""

import copy

import numpy as np
import pytest
import torch
from cases import case
from torch import nn
from torch.optim import lr_scheduler

from baselines import DeMo, Dion
from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon import optimizer as module
from ef21_muon.compressors import Quantize, RankK, TopK
from ef21_muon.norms import AdaptiveRadius, Sign

RATE = 0.0625  # exact in every format
NUMBERS = {
    "float32": lambda x: torch.tensor(x),
    "float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "one entry": lambda x: torch.tensor([x]),
    "a parameter": lambda x: nn.Parameter(torch.tensor(x)),
    "numpy": np.float64,
    "numpy float32": np.float32,
    "numpy array": np.array,
}


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def parameters_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def local(parameters, lr, **options):
    inner = EF21Muon(parameters, lr=lr, process_group=ALONE)
    return LocalSteps(inner, sync_every=2, w2s=TopK(0.5), **options)


METHODS = {
    "decay": lambda p, lr: EF21Muon(p, lr=lr, weight_decay=0.25, w2s=TopK(0.5)),
    "feedback": lambda p, lr: EF21Muon(p, lr=lr, lmo_feedback=True),
    "adaptive": lambda p, lr: EF21Muon(p, lr=lr, norm=Sign(), radius=AdaptiveRadius(0.5, 1)),
    "corrected": lambda p, lr: EF21Muon(p, lr=lr, momentum_kind="mvr"),
    "sign": lambda p, lr: EF21Muon(
        p, lr=lr, lmo="workers", feedback="none", w2s=Quantize("sign@tensor")
    ),
    "local": local,
    "averaged": lambda p, lr: AveragedGradients(torch.optim.AdamW(p, lr=lr)),
    "dion": lambda p, lr: Dion(p, lr=lr),
    "demo": lambda p, lr: DeMo(p, lr=lr, k=4, chunk=4),
}


def train(model, optimizer, steps=3, scheduler=None):
    for step in range(steps):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        if scheduler:
            scheduler.step()
    return parameters_of(model)


def trained(method, lr, scheduled=False):
    model = new_model()
    optimizer = METHODS[method](model.parameters(), lr)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5) if scheduled else None
    return train(model, optimizer, scheduler=schedule)


# All kinds of a method's own numbers and of another's; torch's own AdamW refuses most of them, or
# computes in them.
KINDS = dict.fromkeys(METHODS, ("float32", "one entry"))
KINDS |= {"decay": NUMBERS, "local": NUMBERS, "averaged": ("float32", "float64")}


@pytest.mark.parametrize("method", METHODS)
def test_a_learning_rate_is_the_number_that_it_holds(method):
    expected = trained(method, RATE)
    for kind in KINDS[method]:
        with case(kind):
            found = trained(method, NUMBERS[kind](RATE))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            if method not in ("dion", "demo", "averaged") and kind.startswith(("float", "numpy")):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["decay", "feedback", "adaptive", "local", "dion", "demo"])
def test_schedulers_act_on_it(method):
    expected = trained(method, RATE, True)
    for kind in ("float32", "float64", "one entry") if method == "decay" else ("one entry",):
        with case(kind):
            found = trained(method, NUMBERS[kind](RATE), True)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_tensor_stays_the_callers_and_is_read_in_every_step():
    model, lr = new_model(), torch.tensor(RATE)
    optimizer = EF21Muon(model.parameters(), lr=lr)
    before = train(model, optimizer, steps=1)
    lr.fill_(0)
    assert torch.equal(train(model, optimizer, steps=1), before)
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("method", ["decay", "feedback", "adaptive"])
def test_a_rate_on_another_device_is_multiplied_there(method, monkeypatch):
    """As it is where layers are on that device."""
    expected = trained(method, RATE)
    for dtype in (torch.float32, torch.float64):
        rate = torch.tensor(RATE, dtype=dtype)
        monkeypatch.setattr(module, "lr_of", lambda group, device, rate=rate: rate)
        torch.testing.assert_close(trained(method, RATE), expected, rtol=0, atol=1e-6)


def test_a_state_resumes_with_the_rate_and_apart():
    model = new_model()
    optimizer = EF21Muon(model.parameters(), lr=torch.tensor(RATE))
    train(model, optimizer)
    optimizer.param_groups[0]["lr"].mul_(0.5)
    other = EF21Muon(new_model().parameters(), lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    copied = copy.deepcopy(optimizer)
    optimizer.param_groups[0]["lr"].zero_()
    for one in (other, copied):
        assert float(one.param_groups[0]["lr"]) == RATE / 2
        one.check_agreement()


ENTRIES = {
    "radius": 2.0, "momentum": 0.5, "weight_decay": 0.25, "error_decay": 0.5,
    "server_momentum": 0.5, "gamma": 0.5, "buckets": 2,
}  # fmt: skip


WRAPS = (lambda x: x, torch.tensor, np.array, lambda x: np.array([x])[0])


@pytest.mark.parametrize("name", ENTRIES)
def test_other_numbers_become_pythons(name):
    options = {"feedback": "ef14"} | ({"momentum_kind": "mvr"} if name == "gamma" else {})
    results = []
    for value in (wrap(ENTRIES[name]) for wrap in WRAPS):
        model = new_model()
        optimizer = EF21Muon(model.parameters(), lr=RATE, w2s=TopK(0.5), **options, **{name: value})
        group = optimizer.param_groups[0]
        assert type(group.get(name, 1.0)) is float, repr(value)
        results.append(train(model, optimizer))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("wrap", [torch.tensor, np.array])
def test_numbers_of_local_steps_and_of_what_they_send(wrap):
    results = []
    for number in (lambda x: x, wrap):
        model = new_model()
        optimizer = LocalSteps(
            torch.optim.SGD(model.parameters(), lr=0.1),
            sync_every=np.int64(4),
            outer_lr=number(0.5),
            outer_momentum=number(0.25),
            error_decay=number(0.5),
            sync_delay=number(1),
            buckets=number(2),
            w2s=RankK(np.float32(0.5)),
        )
        results.append(train(model, optimizer, steps=9))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(-1.0), "lr=-1.0 is not allowed: give a number of at least 0"),
        (torch.tensor(float("nan")), "lr=nan is not allowed: give a number of at least 0"),
        (torch.tensor([0.1, 0.2]), "lr=a tensor of shape (2,) is not allowed: give a number of"),
        (torch.zeros(0), "lr=a tensor of shape (0,) is not allowed: give a number of at least 0"),
        (torch.tensor(0.1, device="meta"), "lr=a tensor of shape () is not allowed: give a number"),
        (torch.tensor(True), "lr=True is not allowed: give a number of at least 0"),
        (torch.tensor(0.1j), "lr=0.1"),
        (np.bool_(True), "lr=True is not allowed: give a number of at least 0"),
        (True, "lr=True is not allowed: give a number of at least 0"),
        ("0.1", "lr='0.1' is not allowed: give a number of at least 0"),
    ],
)
def test_what_is_no_number_is_refused_in_one_line(value, message):
    with pytest.raises(ValueError) as error:
        EF21Muon(new_model().parameters(), lr=value)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [torch.tensor(2.5), np.float64(2), torch.tensor(True), True])
def test_a_whole_number_is_whole(value):
    with pytest.raises(ValueError, match=r"^buckets=.* is not allowed: give a whole number above"):
        EF21Muon(new_model().parameters(), buckets=value)
