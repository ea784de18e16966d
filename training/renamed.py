"""Names of earlier versions: refused in overrides, and translated in older logs."""

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import TypeAlias

from ef21_muon import compressors, norms, values
from ef21_muon.checks import renamed
from training.workers import RunError

COMPRESSORS = "|".join(renamed.SPECS)
New: TypeAlias = str | Callable[[re.Match], str]
# Patterns of overrides, and what each is today.
OVERRIDES: dict[str, New] = {
    r"worker_size=": "ranks_per_worker=",
    r"shard=": "fsdp=",
    r"exchange=": "transport=",
    r"batch\.sequences=": "batch.global_size=",
    r"batch\.per_forward=": "batch.micro_size=",
    r"model\.checkpoint_blocks=": "model.activation_checkpointing=",
    r"(optimizer\.(?:\w+\.)*)beta=([\d.]+)": lambda m: f"{m[1]}momentum={_less_than_one(m[2])}",
    r"(optimizer\.(?:\w+\.)*)beta=": r"\1momentum=",
    r"(optimizer\.(?:\w+\.)*)momentum=(polyak|mvr|hessian)": r"\1momentum_kind=\2",
    r"(optimizer\.(?:\w+\.)*)momentum_start=": r"\1momentum_init=",
    r"(optimizer\.(?:\w+\.)*)first_message=exact": r"\1first_message=full",
    r"optimizer\.every=": "optimizer.sync_every=",
    r"optimizer\.stagger=": "optimizer.streaming=",
    r"optimizer\.delay=": "optimizer.sync_delay=",
    rf"(compressor@[\w.]+=)({COMPRESSORS})\b": lambda m: m[1] + renamed.SPECS[m[2]],
    r"(.*\bvalues=.*)@message": r"\1@tensor",
    r"(.*\bvalues=.*)smooth(\d)": r"\1rowcol\2",
    r"(.*)stochastic:( ?)false": r"\1rounding:\2nearest",
    r"(.*)stochastic:( ?)true": r"\1rounding:\2stochastic",
}
# GreedyLore has an interval of its own.
OF_GREEDYLORE: dict[str, New] = {r"optimizer\.every=": "optimizer.refresh_every="}
# Patterns of the labels of runs, and what each is today.
LABELS = {
    r"\bfitted rank\b": "quantized rank",
    r"\bdense (sign|natural)(?!\d)": r"\1",
    r"\bdense\b": "quantize",
    r"\bdamped\b": "scaled",
    r"@message\b": "@tensor",
    r"\bsmooth(\d)": r"rowcol\1",
    r"\bnearest (\S+?)(?=,|$| )": r"\1:nearest",
    r"(?<!whole )(?<!sync )\bevery (?=\d)": "sync every ",
    r"(?<!error )\bdecay (?=[\d.])": "error decay ",
    r"\bouter ([\d.]+)/([\d.]+)": r"outer lr \1, outer momentum \2",
    r"(?<!sync )\bdelay (?=\d)": "sync delay ",
    # Options, which had no commas between them.
    r"(?<!,) (?=(error decay|outer lr|server momentum|sync delay|mean over|no feedback|LMO|AdamW"
    r"|EF21|EF14)\b)": ", ",
}
# Entries of a configuration, by the last part of their dotted key.
ENTRIES = {
    **{
        old: renamed.ARGUMENTS[old] for old in ("momentum_start", "stagger", "delay", "worker_size")
    },
    "checkpoint_blocks": "activation_checkpointing",
    "sequences": "global_size",
    "per_forward": "micro_size",
    "shard": "fsdp",
    "exchange": "transport",
}
CLASSES = {  # by their full names
    **{
        f"ef21_muon.{name}": f"{module.__name__}.{name}"
        for module in (compressors, norms, values)
        for name in module.__all__
    },
    **{f"ef21_muon.{old}": f"ef21_muon.{new}" for old, new in renamed.CLASSES.items()},
}


def refuse_renamed(overrides: Sequence[str]) -> None:
    """Raise RunError for an override in names of earlier versions."""
    for given, new in zip(overrides, modern_overrides(overrides), strict=True):
        if given != new:
            raise RunError(f"{given} has been renamed: give {new}")


def modern_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides in today's names."""
    greedylore = any("greedylore" in one for one in overrides)
    return [
        _modern(one, OVERRIDES | OF_GREEDYLORE if greedylore else OVERRIDES) for one in overrides
    ]


def modern_run(run: dict) -> dict:
    """The run record of a log of any version, in today's names."""
    new = dict(run)
    new["label"] = modern_label(run["label"])
    if "overrides" in run:
        new["overrides"] = modern_overrides(run["overrides"])
    if "config" in run:
        new["config"] = modern_config(run["config"])
    return new


def modern_label(label: str) -> str:
    """The label of a run in today's words."""
    for pattern, new in LABELS.items():
        label = re.sub(pattern, new, label)
    return label


def modern_config(config: dict) -> dict:
    """A run's configuration in today's names."""
    new = {ENTRIES.get(key, key): _modern_node(key, node) for key, node in config.items()}
    if "optimizer" in config:
        new["optimizer"] = _modern_optimizer(config["optimizer"])
    return new


def _modern_optimizer(node: dict) -> dict:
    """An optimizer's, and its inner optimizers'."""
    new, baseline = {}, str(node.get("_target_")).startswith("baselines.")
    for key, value in node.items():
        if isinstance(value, dict) and key not in ("every", "sync_every"):
            new[key] = _modern_optimizer(value)
        elif key == "beta":
            new["momentum"] = float(_less_than_one(value))
        elif key == "momentum" and isinstance(value, str):
            new["momentum_kind"] = value
        elif key == "every":
            new["refresh_every" if baseline else "sync_every"] = value
        elif (key, value) == ("first_message", "exact"):
            new[key] = "full"
        else:
            new[ENTRIES.get(key, key)] = _modern_node(key, value)
    return new


def _modern_node(key: str, node: object) -> object:
    if isinstance(node, dict):
        new = {ENTRIES.get(name, name): _modern_node(name, one) for name, one in node.items()}
        if isinstance(stochastic := new.pop("stochastic", None), bool):
            new["rounding"] = "stochastic" if stochastic else "nearest"
        return new
    if key == "_target_":
        return CLASSES.get(node, node)
    if key in ("values", "basis", "format"):
        return renamed.modern_format(str(node))
    return node


def _modern(override: str, patterns: Mapping[str, New]) -> str:
    prefix = override[: len(override) - len(override.lstrip("+~"))]
    text = override[len(prefix) :]
    for pattern, new in patterns.items():
        text = re.sub(f"^{pattern}", new, text)
    return prefix + text


def _less_than_one(beta: object) -> str:
    """1 - beta, in decimal digits."""
    return format((1 - Decimal(str(beta))).normalize(), "f")
