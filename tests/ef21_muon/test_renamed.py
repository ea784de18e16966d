"""Names of earlier versions: each is refused in one line that has the new one."""

import importlib

import pytest
import torch
from cases import case

import ef21_muon
from ef21_muon import AveragedGradients, EF21Muon, LocalSteps, param_groups
from ef21_muon.checks.renamed import ARGUMENTS, ATTRIBUTES, CLASSES, SPECS, VALUES
from ef21_muon.compressors import Quantize, TopK, from_spec
from ef21_muon.norms import Spectral
from ef21_muon.values import (
    Integer,
    Natural,
    NaturalWindow,
    Normal,
    RowColumn,
    SignScale,
    Statistical,
    value_format,
)


def weights():
    return [torch.nn.Parameter(torch.ones(3, 4))]


def muon(**options):
    return EF21Muon(weights(), **{"norm": Spectral()} | options)


def local(**options):
    return LocalSteps(torch.optim.SGD(weights(), lr=0.1), **options)


def averaged(**options):
    return AveragedGradients(torch.optim.SGD(weights(), lr=0.1), **options)


def grouped(**entries):
    return EF21Muon([{"params": weights(), "norm": Spectral(), "name": "hidden", **entries}])


def with_rules(**entries):
    """Groups of a model by rules of the user's own."""
    rules = {"hidden": {"norm": Spectral(), **entries}}
    return EF21Muon(param_groups(torch.nn.Linear(4, 3, bias=False), rules, roles={"*": "hidden"}))


BUILDERS = {
    build.__name__: build
    for build in (
        *(muon, local, averaged, grouped, with_rules),
        *(Integer, Natural, NaturalWindow, RowColumn, Statistical, SignScale, Normal),
    )
}
# What was given, and what the error says.
ARGUMENTS_AND_VALUES = [
    ("muon", {"beta": 0.1}, "EF21Muon: beta=0.1 has been renamed, give momentum=0.9"),
    ("muon", {"beta": None}, "give momentum, 1 - beta"),
    ("muon", {"momentum": "polyak"}, "give momentum_kind='polyak'"),
    ("muon", {"momentum": "mvr"}, "give momentum_kind='mvr'"),
    ("muon", {"momentum": "hessian"}, "give momentum_kind='hessian'"),
    ("muon", {"momentum_start": "zero"}, "give momentum_init='zero'"),
    ("muon", {"momentum_start": "gradient"}, "give momentum_init='gradient'"),
    ("muon", {"first_message": "exact"}, "give first_message='full'"),
    ("muon", {"missing": "refuse"}, "give missing_grad='error'"),
    ("muon", {"missing": "zero"}, "give missing_grad='zero'"),
    ("muon", {"missing_grad": "refuse"}, "give missing_grad='error'"),
    ("muon", {"kernels": True}, "give conv_scaling=True"),
    ("local", {"every": 30}, "LocalSteps: every=30 has been renamed, give sync_every=30"),
    ("local", {"every": {0: 120, 360: 60}}, "give sync_every={0: 120, 360: 60}"),
    ("local", {"stagger": True}, "give streaming=True"),
    ("local", {"delay": 2}, "give sync_delay=2"),
    ("averaged", {"missing": "refuse"}, "AveragedGradients: missing=refuse has been renamed"),
    ("averaged", {"missing_grad": "refuse"}, "give missing_grad='error'"),
    ("grouped", {"beta": 0.25}, "a parameter group (group hidden): beta=0.25 has been renamed, "),
    ("grouped", {"beta": 0.25}, "give momentum=0.75, which is 1 - beta"),
    ("grouped", {"momentum": "mvr"}, "give momentum_kind='mvr'"),
    ("grouped", {"kernels": False}, "give conv_scaling=False"),
    ("with_rules", {"kernels": True}, "give conv_scaling=True"),
    ("with_rules", {"beta": 0.5}, "give momentum=0.5"),
    ("Natural", {"stochastic": False}, "Natural: stochastic=False has been renamed, give rounding"),
    ("Natural", {"stochastic": True}, "give rounding='stochastic'"),
    ("NaturalWindow", {"stochastic": False}, "give rounding='nearest'"),
    ("Integer", {"bits": 4, "stochastic": False}, "give rounding='nearest'"),
    ("RowColumn", {"stochastic": False}, "give rounding='nearest'"),
    ("NaturalWindow", {"block": "message"}, "give block='tensor'"),
    ("Integer", {"block": "message"}, "give block='tensor'"),
    ("SignScale", {"block": "message"}, "SignScale got block=message: it has been renamed, give"),
    ("Normal", {"block": "message"}, "give block='tensor'"),
    ("Statistical", {"block": "message"}, "give block='tensor'"),
]


def test_arguments_and_values():
    for name, options, said in ARGUMENTS_AND_VALUES:
        with case(name, options), pytest.raises(ValueError) as refused:
            BUILDERS[name](**options)
        assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_table_has_every_argument_and_value():
    given = [option for _, options, _ in ARGUMENTS_AND_VALUES for option in options.items()]
    names = {name for name, _ in given}
    assert names >= ARGUMENTS.keys() - {"worker_size"}  # of the trainer's configuration
    assert {pair for pair in given if isinstance(pair[1], str)} >= VALUES.keys()


def test_an_old_argument_is_an_unknown_one_too():
    """So that `except TypeError`, as for any unknown argument, still holds."""
    with pytest.raises(TypeError, match="sync_every"):
        local(every=3)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        *((build, name) for name in ("agreed", "finish", "missing") for build in (muon, local)),
        *((averaged, name) for name in ("agreed", "finish", "missing")),
        *((local, name) for name in ("delay", "stagger")),
        *((muon, name) for name in ("momentum", "momentum_start")),
        *((muon, name) for name in ("roll_call", "go_on_after")),
    ],
)
def test_attributes(build, name):
    optimizer = build()
    said = f"has no attribute '{name}': it has been renamed, give {ATTRIBUTES[name]}"
    with pytest.raises(AttributeError, match=said):
        getattr(optimizer, name)
    assert hasattr(optimizer, ATTRIBUTES[name]) and not hasattr(optimizer, name)


def test_every_attribute_is_in_the_table():
    (parameters,) = test_attributes.pytestmark
    assert {name for _, name in parameters.args[1]} == ATTRIBUTES.keys()


MOVED = {
    **{
        name: f"ef21_muon.{package}.{name}"
        for package, names in {
            "norms": "L1 AdaptiveRadius BiasRMS Blocks ColumnNorm Euclidean Norm Nuclear RowNorm "
            "Sign Spectral",
            "compressors": "ChunkTopK Compressor Identity RandK RankK TopColumns TopK TopSingular",
            "values": "BFloat16 Float32 Integer Natural NaturalWindow Normal SignScale Statistical",
        }.items()
        for name in names.split()
    },
    "Damping": "ef21_muon.compressors.Scaled",
    "Dense": "ef21_muon.compressors.Quantize",
    "Dropout": "ef21_muon.compressors.Bernoulli",
    "FittedRank": "ef21_muon.compressors.QuantizedRank",
    "SmoothnessAware": "ef21_muon.values.RowColumn",
    "Values": "ef21_muon.values.ValueFormat",
}


def test_names_of_the_package():
    """All that the package had in `__all__` before its norms, compressors and formats moved."""
    for name, place in MOVED.items():
        with case(name), pytest.raises(ImportError) as refused:
            exec(f"from ef21_muon import {name}", {})
        assert str(refused.value) == f"ef21_muon.{name} has been renamed, give {place}"
        package, _, new = place.rpartition(".")
        assert new in importlib.import_module(package).__all__


def test_an_unknown_name_of_the_package_is_none_of_these():
    assert MOVED.keys() >= CLASSES.keys() and not hasattr(ef21_muon, "Muon")
    with pytest.raises(ImportError, match="cannot import name 'Muon'"):
        exec("from ef21_muon import Muon", {})


@pytest.mark.parametrize(
    ("statement", "new"),
    [
        ("import ef21_muon.lmo", "ef21_muon.norms"),
        ("from ef21_muon import lmo", "ef21_muon.norms"),
        ("from ef21_muon.lmo.norms import Spectral", "ef21_muon.norms"),
        ("from ef21_muon.lmo.presets import param_groups", "ef21_muon.norms"),
        ("import ef21_muon.messages", "ef21_muon.compressors or ef21_muon.values"),
        ("from ef21_muon.messages.sparse import TopK", "ef21_muon.compressors"),
        ("from ef21_muon.messages.values import Natural", "ef21_muon.values"),
    ],
)
def test_modules(statement, new):
    with pytest.raises(ImportError, match=f"has been renamed, import from .*{new}") as refused:
        exec(statement, {})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("dense:normal2", "dense has been renamed, give quantize"),
        ("fitted_rank:0.3", "fitted_rank has been renamed, give quantized_rank"),
        ("dropout:0.5:topk:0.1", "dropout has been renamed, give bernoulli"),
        ("damping:0.8:int2", "damping has been renamed, give scaled"),
        ("bernoulli:0.5:dense:int4", "dense has been renamed, give quantize"),
        ("smooth4", "it has been renamed, give rowcol4"),
        ("sign@message", "it has been renamed, give sign@tensor"),
        ("topk:0.05:smooth4", "it has been renamed, give rowcol4"),
        ("quantize:int4@message", "it has been renamed, give int4@tensor"),
    ],
)
def test_specs(spec, said):
    for refuse in (lambda: from_spec(spec), lambda: muon(w2s=spec), lambda: local(s2w=spec)):
        with pytest.raises(ValueError) as refused:
            refuse()
        assert said in str(refused.value) and "\n" not in str(refused.value)


def test_every_spec_is_in_the_table():
    (parameters,) = test_specs.pytestmark
    assert {spec.partition(":")[0] for spec, _ in parameters.args[1]} >= SPECS.keys()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("smooth4", "give rowcol4"),
        ("sign@message", "give sign@tensor"),
        ("statistical4@message", "give statistical4@tensor"),
        ({"format": "smooth8"}, "give rowcol8"),
        ({"format": "int5", "stochastic": False}, "give rounding='nearest'"),
        ({"format": "natural", "stochastic": True}, "give rounding='stochastic'"),
        ({"format": "sign", "block": "message"}, "give block='tensor'"),
    ],
)
def test_formats(values, said):
    for refuse in (value_format, Quantize, lambda values: TopK(0.1, values)):
        with pytest.raises(ValueError) as refused:
            refuse(values)
        assert said in str(refused.value) and "\n" not in str(refused.value)
