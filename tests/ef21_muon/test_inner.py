"""Inner optimizers that begin anew, as those of a worker that was away: like fresh ones."""

import copy

import pytest
import torch
from torch import nn

from ef21_muon import ALONE, EF21Muon, LocalSteps
from ef21_muon.compressors import TopK
from ef21_muon.inner import beginner


class ScheduleFree(torch.optim.Optimizer):
    """Counts in its groups, and averages from where the parameters were at its first step."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.lerp_(z, 1 / group["k"])


class Anchored(torch.optim.SGD):
    """Pulls towards where the parameters were when it was built; counts in an attribute."""

    def __init__(self, params, lr=0.1, pull=0.1):
        super().__init__(params, lr=lr)
        self.pull, self.count = pull, 0
        self.defaults["pull"] = pull
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["anchor"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                anchor = self.state[parameter]["anchor"]
                parameter.lerp_(anchor, self.pull / self.count)
        super().step()


class Apart(torch.optim.SGD):
    """Keeps an option as an attribute."""

    def __init__(self, params, lr=0.1, pace=1.0):
        super().__init__(params, lr=lr)
        self.pace = pace

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=self.pace * group["lr"])


class Around(torch.optim.Optimizer):
    """Is built from another optimizer."""

    def __init__(self, base, k=5):
        super().__init__(base.param_groups, {"lr": 0.1})
        self.base, self.k = base, k


class Keywords(torch.optim.SGD):
    def __init__(self, params, **options):
        super().__init__(params, **options)


def muon(p, **options):
    return EF21Muon(p, process_group=ALONE, **options)


MAKE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd with dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamax": torch.optim.Adamax,
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, t0=1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "muon of torch": lambda p: torch.optim.Muon(p[:1], lr=0.1),
    "groups": lambda p: torch.optim.NAdam(
        [{"params": p[:1], "betas": (0.5, 0.6)}, {"params": p[1:], "lr": 0.3}], lr=0.1
    ),
    "named": lambda p: torch.optim.AdamW([("weight", p[0]), ("bias", p[1])], lr=0.1),
    "schedule-free": ScheduleFree,
    "anchored": Anchored,
    "an option beside the defaults": lambda p: Apart(p, pace=0.3),
    "keywords": lambda p: Keywords(p, lr=0.1, momentum=0.5),
    "ef21_muon": muon,
    "ef21_muon, lossy": lambda p: muon(p, w2s=TopK(0.3), s2w=TopK(0.5), momentum=0.5),
    "ef21_muon, lmo_feedback": lambda p: muon(p, lmo_feedback=True, radius=50),
}


def take(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(inputs).sub(inputs[:, :4].sin()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("moved", [False, True], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("name", MAKE)
def test_an_optimizer_that_begins_anew_is_a_fresh_one_of_its_class(name, moved):
    """But for the lr, which a schedule has set."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = MAKE[name](list(model.parameters()))
    begin_anew = beginner(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        take(model, optimizer, 1, first=step)
        scheduler.step()
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
    begin_anew()
    other_model = copy.deepcopy(model)
    other = MAKE[name](list(other_model.parameters()))
    for group, other_group in zip(optimizer.param_groups, other.param_groups, strict=True):
        other_group["lr"] = group["lr"]
    before = copy.deepcopy(model.state_dict())
    for step in range(4):
        take(model, optimizer, 1, first=10 + step)
        take(other_model, other, 1, first=10 + step)
        for found, expected in zip(model.parameters(), other_model.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(before["weight"], model.weight)


class Other(torch.optim.SGD):
    def __init__(self, params, model):
        super().__init__(params, lr=0.1)


UNFIT = {
    "Other": lambda model: Other(model.parameters(), model),
    "Around": lambda model: Around(torch.optim.SGD(model.parameters())),
}


@pytest.mark.parametrize("name", UNFIT)
def test_one_that_cannot_be_built_again_is_refused(name):
    with pytest.raises(ValueError, match=f"^inner={name} cannot begin anew, as it has to for a w"):
        beginner(UNFIT[name](nn.Linear(3, 3)))


@pytest.mark.parametrize("name", ["rprop", "nadam", "adagrad", "anchored", "ef21_muon, lossy"])
def test_a_worker_that_was_away_begins_anew_from_what_the_others_share(name):
    """It takes over W, and its inner optimizer steps from there as a fresh one."""
    pytest.importorskip("torchft")
    from ef21_muon.fleet import Fleet

    def worker(number):
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        inner = MAKE[name](list(model.parameters()))
        fleet = Fleet(number, "http://localhost:1")
        return model, LocalSteps(inner, sync_every=100, transport=fleet, outer_momentum=0.5)

    (_, there), (model, away) = worker(0), worker(1)
    with torch.no_grad():
        for table in there.transport.shared.tensors():
            table.add_(0.1)
    there.resume_after(60)
    take(model, away, 3)
    away.transport.shared.adopt(there.transport.shared.state())
    assert away.steps == 60
    fresh_model = copy.deepcopy(model)
    fresh = MAKE[name](list(fresh_model.parameters()))
    for table, parameter in zip(
        there.transport.shared.tensors()[::2], model.parameters(), strict=True
    ):
        assert torch.equal(table.flatten(), parameter.flatten())
    take(model, away, 4, first=10)
    take(fresh_model, fresh, 4, first=10)
    for found, expected in zip(model.parameters(), fresh_model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
