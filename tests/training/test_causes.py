"""A class of one's own that cannot be imported or built: one line with the error, file and line."""

import sys

import pytest

from model import GPT
from training.config import build, compose
from training.method import build_optimizer
from training.workers import RunError

TOP = "from ef21_muon.compressors import TopK\n\n\nclass Mine(TopK):\n"
MUON = "from ef21_muon import EF21Muon\n\n\nclass Mine(EF21Muon):\n"
ADAMW = "from torch.optim import AdamW\n\n\nclass Mine(AdamW):\n"
INIT = "    def __init__(self, *args, **options):\n        {}\n"
MEND = ": mend that file, or install what it needs"
TELLS = "give the dotted name of a class that can be imported"
# What the module has, and what is said of it. PATH is its file.
IMPORTS = {
    "a missing module": (
        "\nimport not_there\n",
        f"(ModuleNotFoundError: No module named 'not_there', PATH:2){MEND}",
    ),
    "a missing name": (
        "from ef21_muon import Unheard\n",
        "(ImportError: cannot import name 'Unheard' from 'ef21_muon' (EF21/__init__.py), PATH:1): ",
    ),
    "syntax": ("a = 1\nclass Mine:\n    def\n", f"(SyntaxError: invalid syntax, PATH:3){MEND}"),
    "indentation": ("\n  a = 1\n", f"(IndentationError: unexpected indent, PATH:2){MEND}"),
    "bytes": (
        "a = '\x00'\n",
        "(SyntaxError: source code string cannot contain null bytes",
    ),
    "a name in its body": (
        "Mine = nothing\n",
        f"(NameError: name 'nothing' is not defined, PATH:1){MEND}",
    ),
    "a key in its body": ("a = {}['b']\n", f"(KeyError: 'b', PATH:1){MEND}"),
    "an attribute in its body": (
        "import os\nMine = os.unheard\n",
        f"(AttributeError: module 'os' has no attribute 'unheard', PATH:2){MEND}",
    ),
    "a library's error": (
        "import json\n\njson.loads('{')\n",
        "(JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2",
    ),
    "an assertion": ("assert 1 > 2\n", f"(AssertionError, PATH:1){MEND}"),
    "an end": ("import sys\n\nsys.exit(3)\n", "w2s: mine.Mine left with status 3"),
    "no class": ("Yours = 1\n", f"w2s: Error loading 'mine.Mine': {TELLS}"),
}
CONSTRUCTORS = {
    "key": ("{}['x']", "KeyError: 'x' (PATH:6)"),
    "attribute": (
        "self.unheard",
        "AttributeError: 'Mine' object has no attribute 'unheard' (PATH:6)",
    ),
    "division": ("1 / 0", "ZeroDivisionError: division by zero (PATH:6)"),
    "value": ("raise ValueError('no\\nway')", "ValueError: no way (PATH:6)"),
    "type": ("len(3)", "TypeError: object of type 'int' has no len() (PATH:6)"),
    "runtime": ("raise RuntimeError", "RuntimeError (PATH:6)"),
    "recursion": ("self.__init__()", "RecursionError: maximum recursion depth exceeded"),
    "torch": ("import torch; torch.zeros(2) @ torch.zeros(3)", "RuntimeError: inconsistent tensor"),
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes mine.py; returns a function that says what `told` has to be."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text):
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        (tmp_path / "mine.py").write_text(text)
        library = sys.modules["ef21_muon"].__file__.removesuffix("/__init__.py")
        return lambda told: told.replace("PATH", f"{tmp_path}/mine.py").replace("EF21", library)

    yield write
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("what", IMPORTS)
def test_a_module_that_cannot_be_imported(mine, what):
    text, told = IMPORTS[what]
    expected = mine(text)(told)
    config = compose(("compressor@w2s=topk", "w2s._target_=mine.Mine")).config
    with pytest.raises(RunError) as error:
        build(config.w2s, "w2s")
    assert str(error.value).startswith("w2s: ") and "\n" not in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize("what", CONSTRUCTORS)
@pytest.mark.parametrize(
    ("key", "text", "overrides"),
    [
        ("w2s", TOP, ("compressor@w2s=topk", "w2s._target_=mine.Mine")),
        ("optimizer", MUON, ("optimizer._target_=mine.Mine",)),
        (
            "optimizer.inner",
            ADAMW,
            ("optimizer=diloco", "steps=500", "optimizer.inner._target_=mine.Mine"),
        ),
    ],
)
def test_a_class_that_cannot_be_built(mine, key, text, overrides, what):
    line, told = CONSTRUCTORS[what]
    expected = mine(text + INIT.format(line))(told)
    config = compose(("model.layers=1", *overrides)).config
    model = GPT(build(config.model, "model"))
    with pytest.raises(RunError) as error:
        build_optimizer(config, model)
    assert str(error.value).startswith(f"{key}: {expected}"), str(error.value)
    assert "mine.py:6)" in str(error.value) and "\n" not in str(error.value)


def test_an_optimizer_that_does_not_take_what_every_one_is_given(mine):
    mine(MUON + "    def __init__(self, params, lr):\n        pass\n")
    config = compose(("optimizer._target_=mine.Mine", "model.layers=1")).config
    config.optimizer = {"_target_": "mine.Mine", "lr": 0.1}
    with pytest.raises(RunError, match=r"optimizer: .* unexpected keyword argument '.*': give"):
        build_optimizer(config, GPT(build(config.model, "model")))
