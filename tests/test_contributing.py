"""The recipes of CONTRIBUTING.md, run as they are written; the names in CHANGELOG.md."""

import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from run import ROOT

import baselines
import train
from ef21_muon import compressors, norms
from ef21_muon.checks import renamed
from scripts.shakespeare import runs as study
from training.renamed import OVERRIDES

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", CONTRIBUTING, re.DOTALL))
COMMANDS = re.findall(r"^torchrun .* train\.py (.*)$", CONTRIBUTING, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the recipes, where Python and Hydra look beside those of the repository."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name, text in FILES.items():
        assert not (ROOT / name).exists(), f"the recipe's {name} is there already"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for package in (compressors, norms, baselines):
            beside = folder.joinpath(*package.__name__.split("."))
            patch.setattr(package, "__path__", [*package.__path__, str(beside)])
        patch.setattr("training.config.CONFIGS", folder / "configs")
        yield folder


def described(folder, kind: str):
    """The node of a recipe's file in configs/`kind`."""
    (name,) = (one for one in FILES if one.startswith(f"configs/{kind}/"))
    return OmegaConf.load(folder / name)


@pytest.fixture
def run(folder, small, tmp_path, monkeypatch):
    """Run train.py in this process; returns the first and the last record of the log."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    handlers = [signal.getsignal(number) for number in numbers]

    def run(command: str) -> tuple[dict, dict]:
        overrides = [
            *small,
            *shlex.split(command),
            "checkpoint.every=0",
            f"directory={tmp_path}/run",
        ]
        monkeypatch.setattr("sys.argv", ["train.py", *overrides])
        assert train.main() == 0
        records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        return json.loads(records[0]), json.loads(records[-1])

    yield run
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def test_every_recipe_has_its_files_and_its_command():
    folders = [str(Path(name).parent) for name in FILES]
    assert folders == [
        *("ef21_muon/compressors", "configs/compressor"),
        *("ef21_muon/norms", "configs/norm"),
        *("baselines", "configs/optimizer"),
    ]
    assert len(COMMANDS) == 3


@pytest.mark.parametrize(
    ("command", "label"),
    [*zip(COMMANDS, ["top rows 10% natural", "quantized rank", "signSGD"], strict=True)],
)
def test_a_run_with_the_recipe(run, command, label):
    first, last = run(command)
    assert first["label"].startswith(label) and last["status"] == "completed"
    assert 0 < last["w2s_bytes"] < last["uncompressed_bytes"]


def test_the_row_is_of_a_run_of_the_study(run):
    (row,) = re.findall(r"```python\n# a row of .*\n(.*)\n```", CONTRIBUTING)
    setting = eval(row, vars(study))
    assert setting.name not in study.SETTINGS
    first, last = run(f"experiment=shakespeare {setting.overrides}")
    assert first["label"].startswith("top rows 10%") and last["status"] == "completed"
    assert first["config"]["norm"]["hidden"]["radius"] == 2  # is tuned


def test_the_compressor_is_one(folder):
    compressor = instantiate(described(folder, "compressor"))
    x = torch.randn(3, 16, 10, generator=torch.Generator().manual_seed(0))
    payload = compressor.encode(x)
    assert payload.shape == (3, compressor.payload_bytes(16, 10))
    error = (compressor.decode(payload, 16, 10) - x).square().sum((1, 2))
    assert (error <= (1 - compressor.alpha(16, 10)) * x.square().sum((1, 2))).all()
    assert str(compressor) == "top rows 25% natural"


def test_the_norm_is_one(folder):
    norm = instantiate(described(folder, "norm").hidden.norm)
    gradient = torch.randn(3, 16, 10, generator=torch.Generator().manual_seed(0))
    lmo = norm.lmo(gradient)
    assert torch.equal(lmo.abs().sum(-1), torch.ones(3, 16))  # on the ball
    torch.testing.assert_close((gradient * lmo).sum((-2, -1)), -norm.dual(gradient))


def test_the_method_steps_along_signs(folder):
    weight = torch.nn.Parameter(torch.ones(4, 3))
    groups = [{"name": "hidden", "params": [("weight", weight)]}]
    optimizer = instantiate(described(folder, "optimizer"), groups, _convert_="object")
    weight.grad = torch.linspace(-1, 2, 12).view(4, 3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), 1 - optimizer.defaults["lr"] * weight.grad.sign())


def words(table: dict) -> list[str]:
    """Names in a table of renamed ones; of patterns of overrides, the keys before the =."""
    if table is OVERRIDES:
        return [key for old in table for key in re.findall(r"(?<!\\)\b([a-z_]\w+)=", old)]
    return [*table, *map(str, table.values())]


@pytest.mark.parametrize(
    "table",
    [renamed.ARGUMENTS, renamed.ATTRIBUTES, renamed.CLASSES, renamed.SPECS, OVERRIDES],
    ids=["arguments", "attributes", "classes", "specs", "overrides"],
)
def test_the_changelog_has_every_renamed_name(table):
    missing = [one for one in words(table) if not re.search(rf"\b{re.escape(one)}\b", CHANGELOG)]
    assert missing == [] and len(words(table)) > 3
