"""What the README says works: its code runs, its overrides compose, its files exist."""

import re
import shlex

import pytest
import torch
from a_round import a_round
from readme import README, blocks
from run import ROOT

from training.config import build, compose, sweep


def test_the_loop_runs_as_printed(capsys):
    _, _, loop = blocks("python")
    scope = {}
    exec(loop, scope)
    sent = int(capsys.readouterr().out.split()[0])
    optimizer = scope["optimizer"]
    assert sent == optimizer.w2s_bytes == 20 * a_round(optimizer).w2s_bytes > 0
    assert scope["loss"] < 4  # log(64) = 4.16 at the start


SENT = "rank 15% natural"


def test_groups_and_two_optimizers_run_as_printed():
    model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 48))
    model.append(torch.nn.Linear(48, 10))
    scope = {"model": model}
    groups, two, *_ = blocks("py")
    exec(groups, scope)
    assert [str(group["w2s"]) for group in scope["optimizer"].param_groups] == 2 * [SENT]
    exec(two, scope)
    before = [parameter.clone() for parameter in model.parameters()]
    model(torch.arange(8)).square().mean().backward()
    for optimizer in scope["optimizers"]:
        optimizer.step()
    assert [group["name"] for group in scope["hidden"]] == ["hidden"] and len(scope["rest"]) == 3
    for parameter, start in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, start)


def test_local_steps_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local, *_ = blocks("python")
    scope = {"model": torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4))}
    with torch.no_grad():
        start = scope["model"][1].weight.clone()
    made, used = local.split("# optimizer.step()")
    exec(made, scope)
    for _ in range(3):
        scope["model"](torch.arange(3)).sum().backward()
        scope["optimizer"].step()
    exec("# " + used, scope)
    assert torch.equal(torch.load("model.pt")["1.weight"], start)  # no round has been
    assert not torch.equal(scope["model"][1].weight, start)


OVERRIDES = [
    line
    for line in re.findall(r"`([^`\n]+)`", README.split("## Cheat sheet")[1].split("A run dir")[0])
    if re.match(r"(-m )?[+\w@.]+=", line)
]


@pytest.mark.parametrize("line", OVERRIDES)
def test_the_cheat_sheet_composes(line):
    words = shlex.split(line.replace("...", ""))
    multirun = "-m" in words
    overrides = [word for word in words if word != "-m"]
    for job in sweep(overrides, multirun):
        config = compose(("compressor@s2w=topk", *job) if "s2w." in line else job).config
        assert build(config.w2s, "w2s") and build(config.s2w, "s2w")


def test_the_files_it_names_exist():
    names = re.findall(r"`((?:[\w.]+/)*[\w.]+\.py|\w+/)`", README)
    assert len(names) > 8
    library = {path.name for path in (ROOT / "ef21_muon").iterdir()}
    assert [n for n in names if not (ROOT / n).exists() and n not in library] == []
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists(), picture
