"""The learning rate, step by step."""

from warnings import catch_warnings, simplefilter

import pytest
import torch
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from training.config import compose, what_matters
from training.resume import require_same_config
from training.schedule import due, lr_factor, new_scheduler
from training.workers import RunError

LR = 0.3


def test_the_learning_rate_is_a_trapezoid(small):
    overrides = ("steps=10", "schedule.warmup=0.2", "schedule.cooldown=0.5")
    config = compose((*small, *overrides)).config
    factors = [lr_factor(step, config) for step in range(11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def lrs_of(steps, scheduler, optimizer):
    """The lr of every step."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def torch_schedule(optimizer, steps, warmup, shape, cooldown, floor):
    """LinearLR up, and then CosineAnnealingLR, or what is constant and LinearLR down."""
    parts, milestones = [], []
    if warmup:
        rise = {"start_factor": 1 / warmup, "total_iters": max(1, warmup - 1)}
        parts, milestones = [LinearLR(optimizer, **rise)], [warmup]
    if shape == "cosine":
        parts.append(CosineAnnealingLR(optimizer, steps - warmup, eta_min=floor * LR))
    else:
        parts.append(LinearLR(optimizer, start_factor=1.0, total_iters=1))
        fall = {"start_factor": 1.0, "end_factor": floor, "total_iters": cooldown}
        parts.append(LinearLR(optimizer, **fall))
        milestones.append(steps - cooldown)
    return SequentialLR(optimizer, parts, milestones)


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
@pytest.mark.parametrize("shape", ["trapezoid", "cosine"])
def test_it_is_that_of_torchs_own_schedulers(small, shape, warmup, floor):
    steps, cooldown = 40, 16
    told = [f"steps={steps}", f"schedule.warmup={warmup / steps}", f"schedule.floor={floor}"]
    config = compose((*small, *told, f"schedule.shape={shape}")).config
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=LR) for _ in range(2)]
    found = lrs_of(steps, new_scheduler(optimizers[0], config, 0), optimizers[0])
    with catch_warnings():
        simplefilter("ignore")  # torch's own, of SequentialLR
        theirs = torch_schedule(optimizers[1], steps, warmup, shape, cooldown, floor)
        expected = lrs_of(steps, theirs, optimizers[1])
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[-1] >= floor * LR


@pytest.mark.parametrize("shape", ["trapezoid", "cosine"])
def test_it_goes_on_in_the_middle_and_ends_at_the_floor(small, shape):
    told = ("steps=20", "schedule.warmup=0.2", "schedule.floor=0.1", f"schedule.shape={shape}")
    config = compose((*small, *told)).config
    factors = [lr_factor(step, config) for step in range(25)]
    assert factors[20:] == pytest.approx([0.1] * 5) and max(factors) == 1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=LR)
    found = lrs_of(7, new_scheduler(optimizer, config, 13), optimizer)
    assert found == pytest.approx([LR * factor for factor in factors[13:20]])


def test_new_keys_at_their_defaults_leave_runs_as_they_were(small):
    """Their names, what a checkpoint is compared by, and of a log what the study does."""
    for method in ("local", "diloco", "muloco", "sparseloco", "ef21_muon", "adamw"):
        as_before = ("optimizer.mean=all",) if method == "sparseloco" else ()
        config = compose((*small, f"optimizer={method}", *as_before)).config
        now = OmegaConf.to_container(config)
        before = {key: value for key, value in now.items() if key != "clip_grad_norm"}
        before["schedule"] = {"warmup": 0.0, "cooldown": 0.4}
        before["optimizer"] = {k: v for k, v in now["optimizer"].items() if k != "mean"}
        assert what_matters(now) == what_matters(before)
        told = {"schedule.floor": 0.1, "schedule.shape": "cosine", "clip_grad_norm": 1.0}
        changed = compose(
            (*small, f"optimizer={method}", *as_before, *(f"{k}={v}" for k, v in told.items()))
        )
        assert what_matters(OmegaConf.to_container(changed.config)) == what_matters(now) | told


def test_a_checkpoint_without_a_key_is_refused_by_what_it_stood_for(small, tmp_path):
    given = (*small, "optimizer=sparseloco", "schedule.floor=0.1")
    config = compose(given).config
    saved = OmegaConf.to_container(config)
    del saved["optimizer"]["mean"], saved["schedule"]["floor"], saved["clip_grad_norm"]
    told = r"optimizer\.mean='senders' \(it has 'all'\), schedule\.floor=0\.1 \(it has 0\.0\); give"
    with pytest.raises(RunError, match=told):
        require_same_config(config, saved, tmp_path)
    config = compose((*given, "optimizer.mean=all", "schedule.floor=0")).config
    require_same_config(config, saved, tmp_path)


def test_what_is_due_every_step_is_due_in_each_and_what_is_never_in_none():
    assert [step for step in range(1, 7) if due(step, 1)] == [1, 2, 3, 4, 5, 6]
    assert [step for step in range(1, 7) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(1, 7))
