"""Docstrings of the library: every public name says all of its arguments, and examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re
import sys

import pytest
import torch

import ef21_muon
from ef21_muon import compressors, norms, values

PACKAGES = (ef21_muon, norms, compressors, values)
REFUSED = ("ef21_muon.lmo", "ef21_muon.messages")  # names of earlier versions
# Their examples need several ranks, or other processes.
NOT_RUN = ("ef21_muon.transport.mesh", "ef21_muon.fleet.fleet")
# What a section of Google style is called.
SECTIONS = "Args|Attributes|Example|Examples|Note|Raises|References|Returns|Yields"
# Of torch, or of Python, with docstrings of their own.
FOREIGN = (torch.optim.Optimizer, object)

pytestmark = pytest.mark.skipif(
    sys.flags.optimize > 1, reason="PYTHONOPTIMIZE=2 takes docstrings away"
)


def modules():
    """The names of all modules, but those of packages that are not installed."""
    yield "ef21_muon"
    for found in pkgutil.walk_packages(ef21_muon.__path__, "ef21_muon.", onerror=lambda _: None):
        if found.name not in REFUSED:
            yield found.name


def public():
    """Classes and functions of the packages' `__all__`, by name."""
    for package in PACKAGES:
        for name in package.__all__:
            one = getattr(package, name)
            if inspect.isclass(one) or inspect.isfunction(one):
                yield f"{package.__name__}.{name}", one


PUBLIC = dict(public())


def methods(kind):
    """Public methods and properties of a class of this library, by name."""
    for name, value in inspect.getmembers(kind):
        called = value.fget if isinstance(value, property) else value
        own = inspect.isfunction(called) and called.__name__ != "<lambda>"
        theirs = any(getattr(other, name, None) is value for other in FOREIGN)
        if own and not name.startswith("_") and not theirs:
            yield name, value


METHODS = {
    f"{name}.{method}": value
    for name, one in PUBLIC.items()
    if inspect.isclass(one)
    for method, value in methods(one)
}


def sections(text):
    """The sections of a docstring by name, each with its text."""
    parts = re.split(rf"^({SECTIONS}):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(text):
    """The names that Args has, in order."""
    return re.findall(r"^    (\w+): \S", sections(text).get("Args", ""), re.MULTILINE)


def parameters(one):
    """Those of a signature, without self."""
    return [name for name in inspect.signature(one).parameters if name != "self"]


def complaints(text, taken, example):
    """What a docstring lacks."""
    first, _, rest = text.partition("\n")
    if not first.endswith((".", "?")) or rest.partition("\n")[0].strip():
        yield "has no first sentence of one line"
    if taken != (found := documented(text)):
        yield f"documents {found} of {taken}"
    if example and not sections(text).get("Example", "").strip():
        yield "has no example"


def test_public_names():
    for name, one in PUBLIC.items():
        found = [*complaints(inspect.getdoc(one) or "", parameters(one), example=True)]
        assert found == [], name


def test_public_methods():
    """They have a first sentence; and where there are Args, all of them."""
    for name, value in METHODS.items():
        text = inspect.getdoc(value) or ""
        taken = parameters(value) if inspect.isfunction(value) and documented(text) else []
        inherited = inspect.isfunction(value) and not value.__doc__
        if inherited:  # by another name for an argument, it may be
            taken = documented(text)
        assert [*complaints(text, taken, example=False)] == [], name


def test_all_are_seen():
    assert len(PUBLIC) > 30 and len(METHODS) > 200
    assert PUBLIC.keys() >= {"ef21_muon.EF21Muon", "ef21_muon.values.value_format"}
    assert METHODS.keys() >= {"ef21_muon.EF21Muon.step", "ef21_muon.LocalSteps.final_sync"}


FAULTS = {
    "has no first sentence of one line": "A sentence\nof two lines.",
    "documents ['a'] of ['a', 'b']": "Fits.\n\nArgs:\n    a: one.\n\nExample:\n    >>> 1",
    "documents ['b', 'a'] of ['a', 'b']": "Fits.\n\nArgs:\n    b: one\n        c: two.\n    a: 3.",
    "has no example": "Fits.\n\nArgs:\n    a: one.\n    b: two.\n\nReturns:\n    >>> no",
}


@pytest.mark.parametrize("complaint", FAULTS)
def test_a_fault_is_found(complaint):
    assert complaint in complaints(FAULTS[complaint], ["a", "b"], example=True)


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    if name.startswith("ef21_muon.fleet"):
        pytest.importorskip("torchft")
    module = importlib.import_module(name)
    torch.manual_seed(0)
    if name in NOT_RUN:
        for test in doctest.DocTestFinder().find(module):
            compile("".join(example.source for example in test.examples), test.name, "exec")
        return
    result = doctest.testmod(module, extraglobs={"torch": torch, "ef21_muon": ef21_muon})
    assert result.failed == 0


def test_modules_with_examples_are_among_them():
    found = {name for name in modules() if not name.startswith("ef21_muon.fleet")}
    finder = doctest.DocTestFinder()
    with_examples = {
        name
        for name in found
        if any(test.examples for test in finder.find(importlib.import_module(name)))
    }
    assert with_examples >= {
        "ef21_muon.optimizer",
        "ef21_muon.compressors.sparse",
        "ef21_muon.norms.lmo",
        "ef21_muon.values.scaled",
    }
