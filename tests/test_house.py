"""The house: how long modules and functions may be, what each says first, and who imports whom."""

import ast
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
from run import ROOT, SUPPORT

LINES, LINES_OF_A_FUNCTION = 400, 70
LEFT_OUT = ("runs", "build", "wandb")  # and what is hidden
# What a module may import beside its own folder. Of the names that fit it, the longest holds.
LIBRARIES = ("ef21_muon", "baselines", "data", "model")
DIRECTIONS = {
    "ef21_muon": (),
    "ef21_muon.values": ("ef21_muon.checks.renamed",),
    "ef21_muon.compressors": (
        *("ef21_muon.values", "ef21_muon.norms.newton_schulz", "ef21_muon.checks.renamed"),
    ),
    "ef21_muon.norms": (),
    "ef21_muon.norms.presets": ("ef21_muon.compressors.base",),
    "ef21_muon.transport": ("ef21_muon.layers", "ef21_muon.checks.settings"),
    "ef21_muon.checks": ("ef21_muon",),
    "ef21_muon.fleet": ("ef21_muon",),
    "baselines": ("ef21_muon",),
    "data": (),
    "model": (),
    "training": LIBRARIES,
    "train": ("training", *LIBRARIES),
    "sample": ("training", "data", "model"),
    "scripts": ("train", "training", *LIBRARIES),
    "scripts.*.*": (
        *("scripts.faults", "scripts.fleet", "scripts.measuring", "scripts.netns"),
        *("scripts.studies", "scripts.supervise"),
        "train",
        "training",
        *LIBRARIES,
    ),
    "scripts.probes": ("scripts.studies", "scripts.shakespeare", "training", *LIBRARIES),
    "tests": ("*",),
    "noxfile": (),
}
ROOMS = {name.partition(".")[0] for name in DIRECTIONS}
HELPERS = {path.stem for path in SUPPORT.iterdir()}  # of tests, by which they import them


@dataclass
class Module:
    name: str
    text: str

    def __post_init__(self):
        self.tree = ast.parse(self.text)
        self.nodes = list(ast.walk(self.tree))
        self.imports = list(imports(self))

    @property
    def folder(self) -> str:
        return self.name.rpartition(".")[0]


@cache
def read(name: str, text: str) -> Module:
    return Module(name, text)


def modules(root: Path) -> Iterator[Module]:
    """All below the root; a package is the module `__init__` of its folder."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(n for n in folders if n not in LEFT_OUT and not n.startswith("."))
        for path in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            yield read(name, path.read_text())


def fits(name: str, pattern: str) -> bool:
    """Whether it has that name, or lies in what has it."""
    return fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*")


def imports(module: Module) -> Iterator[str]:
    """The full names of what it imports, wherever in it."""
    for node in module.nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.name.split(".")[: -node.level] if node.level else []
            source = [*above, *filter(None, [node.module])]
            yield from (".".join([*source, alias.name]) for alias in node.names)


def is_short(module: Module) -> Iterator[str]:
    if (lines := len(module.text.splitlines())) > LINES:
        yield f"has {lines} lines"


def has_short_functions(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > LINES_OF_A_FUNCTION:
                yield f"{node.name} has {lines} lines"


def says_what_it_is(module: Module) -> Iterator[str]:
    if not (ast.get_docstring(module.tree, clean=False) or "").partition("\n")[0].strip():
        yield "says nothing in its first line"


def imports_downwards(module: Module) -> Iterator[str]:
    places = [name for name in DIRECTIONS if fits(module.name, name)]
    if not places:
        yield "has no place among the directions"
        return
    allowed = (*DIRECTIONS[max(places, key=len)], module.folder or module.name)
    for name in module.imports:
        top = name.partition(".")[0]
        if top in ROOMS | HELPERS and not any(fits(name, other) for other in allowed):
            yield f"imports {name}"


def needs_torch_alone(module: Module) -> Iterator[str]:
    allowed = sys.stdlib_module_names | {"torch", "ef21_muon"} | EXTRAS.get(module.name, set())
    for name in module.imports if fits(module.name, "ef21_muon") else ():
        if name.partition(".")[0] not in allowed:
            yield f"imports {name}"


def checks_without_assert(module: Module) -> Iterator[str]:
    """Which PYTHONOPTIMIZE takes away."""
    for node in module.nodes:
        if isinstance(node, ast.Assert) and not fits(module.name, "tests"):
            yield f"asserts in line {node.lineno}"


def draws_by_agg(module: Module) -> Iterator[str]:
    """A notebook's MPLBACKEND ends whoever imports matplotlib elsewhere first."""
    if not fits(module.name, "tests") and module.name != "training.drawing":
        for name in module.imports:
            if name.partition(".")[0] == "matplotlib":
                yield f"imports {name}"


EXTRAS = {"ef21_muon.fleet.connections": {"torchft"}}

RULES = (
    *(is_short, has_short_functions, says_what_it_is, imports_downwards, needs_torch_alone),
    *(checks_without_assert, draws_by_agg),
)


def complaints(root: Path, rule) -> list[str]:
    return [f"{module.name} {what}" for module in modules(root) for what in rule(module)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_is_in_order(rule):
    assert complaints(ROOT, rule) == []


def test_every_module_was_seen():
    names = {module.name for module in modules(ROOT)}
    assert names >= {"train", "ef21_muon.norms.lmo", "ef21_muon.__init__", "tests.test_house"}
    assert len(names) > 100 and not any("site-packages" in name for name in names)


LONG_FUNCTION = "class A:\n    def long(self):\n" + 70 * "        pass\n"
FAULTS = [
    (is_short, "training/long.py", 401 * "pass\n", "training.long has 401 lines"),
    (has_short_functions, "data/long.py", LONG_FUNCTION, "data.long long has 71 lines"),
    (says_what_it_is, "data/__init__.py", '"""\nLate."""', "data.__init__ says nothing in its fir"),
    (imports_downwards, "training/up.py", "import train", "training.up imports train"),
    (imports_downwards, "model.py", "def f():\n    import tests", "model imports tests"),
    (imports_downwards, "scripts/a.py", "from run import ROOT", "scripts.a imports run.ROOT"),
    (
        imports_downwards,
        "data/up.py",
        "from ef21_muon import L1",
        "data.up imports ef21_muon.L1",
    ),
    (imports_downwards, "scripts/a/b.py", "import scripts.c.d", "scripts.a.b imports scripts.c.d"),
    (imports_downwards, "other/a.py", "", "other.a has no place among the directions"),
    (
        imports_downwards,
        "ef21_muon/transport/up.py",
        "from ..optimizer import EF21Muon",
        "ef21_muon.transport.up imports ef21_muon.optimizer.EF21Muon",
    ),
    (
        imports_downwards,
        "ef21_muon/compressors/beside.py",
        "from ef21_muon.norms import lmo, newton_schulz",
        "ef21_muon.compressors.beside imports ef21_muon.norms.lmo",
    ),
    (checks_without_assert, "data/a.py", "def f():\n    assert 1", "data.a asserts in line 2"),
    (needs_torch_alone, "ef21_muon/a.py", "import os, numpy.fft", "ef21_muon.a imports numpy.fft"),
    (
        draws_by_agg,
        "scripts/a.py",
        "from matplotlib.figure import Figure",
        "scripts.a imports matplotlib.figure.Figure",
    ),
]


IN_ORDER = {
    "training/within.py": '"""Fits."""\n' + 399 * "pass\n",
    "baselines/within.py": '"""Fits."""\ndef long():\n' + 69 * "    pass\n",
    "train.py": '"""Trains."""\nimport numpy\nfrom training import within\nimport data.long',
    "ef21_muon/norms/presets.py": '"""Sets."""\nfrom ef21_muon.compressors.base import A',
    "scripts/b/c.py": '"""Runs."""\nfrom scripts.netns import A\nfrom . import d\nimport train',
    "tests/test_a.py": '"""Tests."""\nimport train, scripts.a\nfrom run import ROOT\nassert 1',
    ".hidden/a.py": "import train\n" + 400 * "pass\n",
}


@pytest.mark.parametrize(
    ("rule", "path", "text", "complaint"), FAULTS, ids=[one[-1] for one in FAULTS]
)
def test_a_fault_is_found(tmp_path, rule, path, text, complaint):
    """And nothing else, beside it."""
    for name, content in (IN_ORDER | {path: text}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (found,) = complaints(tmp_path, rule)
    assert found.startswith(complaint)
