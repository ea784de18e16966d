"""What users do on two ranks: optimizers for the rest, missing gradients, steps taken alone."""

import json

import pytest
import torch
from run import torchrun
from torch import nn
from workers import strangers

from ef21_muon import ALONE, EF21Muon
from ef21_muon.compressors import TopK
from ef21_muon.norms import Spectral

FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("strangers")
    torchrun("strangers.py", directory, ranks=2)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", strangers.DIFFERENT)
def test_an_optimizer_that_differs_between_ranks_is_not_built(reports, name):
    lines = {report[f"different {name}"] for report in reports}
    assert len(lines) == 1, "on all ranks alike"
    (line,) = lines
    start = {"lr as a tensor": "lr"}.get(name, name)
    assert line.startswith(f"{start} ") and " on rank 0 and " in line
    assert line.endswith(" on rank 1: give all workers the same optimizer")


def mean_gradients(model, step):
    """Of both workers' losses."""
    model.zero_grad()
    (sum(strangers.loss_of(model, step, rank) for rank in range(2)) / 2).backward()


def trained_on_means():
    """EF21Muon of one worker, and torch's AdamW, on the mean gradient."""
    model = strangers.new_model()
    hidden = model[1].weight
    others = [parameter for parameter in model.parameters() if parameter is not hidden]
    optimizers = [
        EF21Muon([hidden], lr=strangers.LR, norm=Spectral("svd"), process_group=ALONE),
        torch.optim.AdamW(others, lr=strangers.LR),
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in optimizers]
    for step in range(strangers.STEPS):
        mean_gradients(model, step)
        for one in (*optimizers, *schedulers):
            one.step()
    return model, others


def test_adamw_of_averaged_gradients_is_that_of_their_mean(reports):
    model, others = trained_on_means()
    for report in reports:
        parameters, sent = report["mixed"]
        torch.testing.assert_close(torch.tensor(parameters), strangers.parameters_of(model))
        assert sent == strangers.STEPS * FLOAT * sum(one.numel() for one in others)


@pytest.mark.parametrize("case", ["rank0", "sharded", "replicated", "ef14"])
def test_adamw_of_compressed_gradients_is_the_same_on_all_ranks_and_servers(reports, case):
    (first, sent), (second, _) = (report[f"mixed {case}"] for report in reports)
    assert first == second
    if case != "ef14":
        assert first == reports[0]["mixed replicated"][0]
    model, others = trained_on_means()
    shapes = [one.shape if one.ndim > 1 else (len(one), 1) for one in others]
    assert sent == strangers.STEPS * sum(TopK(0.3).payload_bytes(*shape) for shape in shapes)
    start = strangers.parameters_of(strangers.new_model())
    exact, ours = strangers.parameters_of(model) - start, torch.tensor(first) - start
    assert torch.nn.functional.cosine_similarity(exact, ours, dim=0) > 0.8
    assert not torch.equal(exact, ours)


def test_a_missing_gradient_is_zero_where_that_was_asked_for(reports):
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    optimizer = EF21Muon(model.parameters(), lr=strangers.LR, norm=Spectral("svd"))
    for step in range(4):
        optimizer.zero_grad()
        losses = []
        for rank in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randn(8, 4, generator=generator)
            losses.append(model[rank if step % 2 else 0](x).square().mean())
        (sum(losses) / 2).backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for report in reports:
        torch.testing.assert_close(torch.tensor(report["zero"]), strangers.parameters_of(model))


@pytest.mark.parametrize("how", ["late", "refused", "local"])
def test_who_waits_in_a_step_says_for_whom_and_continues_when_it_comes(reports, how):
    assert reports[1][how] == []
    (line,) = reports[0][how]
    assert line.startswith("rank 0 has waited for ") and " s in step 2 for rank 1" in line
    assert "give every rank as many steps (batches)" in line
    refused = "; rank 1 refused it: parameter 1 of group 0 has no gradient: " in line
    assert refused == (how == "refused")


def test_who_is_left_alone_in_a_step_is_advised(reports):
    (note,) = reports[0]["left"]
    assert note.startswith("another rank has ended, or failed first, while this one waited")


def test_learning_rates_that_diverge_as_tensors_are_reported(reports):
    line = "lr of group 0 is 0.5 on rank 0 and 0.25 on rank 1: give all workers the same groups, "
    for report in reports:
        assert report["rates"] == ["no error", f"{line}and schedules"]


@pytest.mark.parametrize("missing", ["skip", None, True])
def test_other_policies_are_named(missing):
    with pytest.raises(ValueError, match=r"^missing_grad=.* is not allowed: choose error, zero$"):
        EF21Muon(nn.Linear(2, 2).parameters(), missing_grad=missing)


def test_a_refused_gradient_tells_of_the_policy():
    optimizer = EF21Muon(nn.Linear(2, 2).parameters())
    with pytest.raises(RuntimeError, match=r"has no gradient: .*missing_grad='zero'"):
        optimizer.step()
