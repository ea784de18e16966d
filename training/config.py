"""From overrides to checked configurations: Hydra composition, sweeps and run names."""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from ef21_muon.checks.settings import compressor_of
from training.causes import cause_of
from training.links import check_plan
from training.membership import check_membership
from training.renamed import refuse_renamed
from training.schedule import check_schedule
from training.schema import ALLOWED, KINDS, Config
from training.workers import RunError, one_line

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
# Keys that change no numbers of a run, except their rounding, and so not its name.
INCIDENTAL = {
    *("runs", "directory", "log_every", "diagnostics_every", "check_every", "fail_fast"),
    *("wandb", "label", "checkpoint", "resume", "dry_run", "plan", "transport", "fsdp"),
    "membership",
    "model.activation_checkpointing",
}
# The nodes that describe an object, and the override that chooses a file for each node.
CHOICES = {
    "model": "model",
    "optimizer": "optimizer",
    "w2s": "compressor@w2s",
    "s2w": "compressor@s2w",
}
WAYS = ("w2s", "s2w")  # nodes that may be the spec of a compressor, such as rank:0.15:natural
SPEC = re.compile(r"[+~]*((?:norm\.\w+\.)?(?:w2s|s2w))=([^{].*)")  # an override with a spec
# The entries that a role may have in the norm group, and those that describe an object.
RULE = ("norm", "radius", "lmo_feedback", "w2s", "s2w")
DESCRIBED = {
    "norm": "give norm.ROLE.norm._target_=CLASS, as in configs/norm",
    "w2s": "give +norm.ROLE.w2s=SPEC, such as rank:0.15:natural",
    "s2w": "give +norm.ROLE.s2w=SPEC, such as rank:0.15:natural",
}


@dataclass(frozen=True)
class Job:
    """One run: its overrides as they were given, and its configuration."""

    overrides: tuple[str, ...]
    config: DictConfig

    def name(self, workers: int) -> str:
        """The overrides, and a short hash of the configuration and the number of workers."""
        resolved = OmegaConf.to_container(self.config, resolve=True)
        digest = hashlib.sha256(
            json.dumps([_essential(resolved), workers], sort_keys=True).encode()
        ).hexdigest()
        overridden = [
            override.removeprefix("compressor@")
            for override in self.overrides
            if not INCIDENTAL.intersection(
                re.match("(([^.=]*)[^=]*)", override.lstrip("+~")).groups()
            )
        ]
        readable = re.sub(r"[^\w.=,@+~-]+", "-", ",".join(overridden) or "default")[:100]
        return f"{readable}-{digest[:8]}"


def what_matters(config: dict) -> dict:
    """The values that determine a run's numbers, by dotted key.

    Those of baselines have no compressors.
    """
    essential = _essential(config)
    if config["optimizer"]["_target_"].startswith("baselines."):
        essential = {key: essential[key] for key in essential.keys() - {"w2s", "s2w"}}
    return flat(essential)


def flat(config: dict) -> dict:
    """The values of nested dictionaries by dotted key."""
    values, left = {}, list(config.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{name}", inner) for name, inner in value.items()]
        else:
            values[key] = value
    return values


# Values that older versions had before there was a choice. Names of runs leave them out.
AS_BEFORE = {
    **{"momentum_kind": "polyak", "gamma": 1.0, "mean": "all"},  # optimizer
    **{"shape": "trapezoid", "floor": 0.0},  # schedule
    **{"precision": "auto", "clip_grad_norm": None},
}


def _essential(config: dict) -> dict:
    model = {k: v for k, v in config["model"].items() if f"model.{k}" not in INCIDENTAL}
    own = {"model": model, "compile": config.get("compile") is not False}
    for key in ("optimizer", "schedule"):
        own[key] = {k: v for k, v in config[key].items() if AS_BEFORE.get(k) != v}
    if config.get("membership", {}).get("workers"):  # the tokens have as many parts
        own["workers"] = config["membership"]["workers"]
    kept = {k: v for k, v in config.items() if k not in INCIDENTAL and AS_BEFORE.get(k) != v}
    return kept | own


def sweep(overrides: list[str], multirun: bool) -> list[tuple[str, ...]]:
    """The overrides of every job: with `multirun`, the product of all comma-separated values.

    Overrides that vary come first, so that names of runs begin with what differs. Raises RunError
    for an override that Hydra cannot parse.
    """
    if not multirun:
        return [tuple(overrides)]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        parsed.sort(key=lambda one: not one.is_sweep_override())
        choices = [
            # Hydra escapes colons, as those of specs, where there is no need to.
            [
                f"{one.get_key_element()}={value}".replace("\\:", ":")
                for value in one.sweep_string_iterator()
            ]
            if one.is_sweep_override()
            else [one.input_line]
            for one in parsed
        ]
    except HydraException as error:
        raise RunError(_explain(error, overrides)) from error
    return list(itertools.product(*choices))


def compose(overrides: tuple[str, ...]) -> Job:
    """Compose and check one job's configuration.

    Raises RunError for unknown keys, for values of the wrong type and for those out of range.
    """
    for override in overrides:
        if override.lstrip("+~").startswith("hydra."):
            raise RunError(f"{override} has no effect here: give runs= or directory=")
    refuse_renamed(overrides)
    _require_one_description(overrides)
    try:
        config = OmegaConf.merge(OmegaConf.structured(Config), _composed(overrides))
        OmegaConf.resolve(config)
        OmegaConf.to_container(config, throw_on_missing=True)
    except YAMLError as error:
        raise RunError(f"{one_line(error)}: correct that file") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise RunError(_explain(error, overrides)) from error
    _check_nodes(config)
    _check_ranges(config, overrides)
    return Job(tuple(overrides), config)


def _require_one_description(overrides: tuple[str, ...]) -> None:
    """Raise RunError for a compressor that is given by its spec and in another way, too."""
    for key, spec in (match.groups() for one in overrides if (match := SPEC.fullmatch(one))):
        for other in overrides:
            if other.lstrip("+~").startswith((f"{key}.", f"compressor@{key}=")):
                raise RunError(
                    f"{other} is not allowed beside {key}={spec}, which describes the whole "
                    f"compressor: change the spec, or give compressor@{key}=NAME and {key}.OPTION"
                )


def _composed(overrides: Iterable[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("config", list(overrides))


def build(node: DictConfig | str, key: str, **options):
    """The object that a configuration node describes, or the compressor of a spec.

    Raises RunError that names the key where the class cannot be imported or refuses its values.
    """
    if isinstance(node, str):
        try:
            return compressor_of(key, node)
        except ValueError as error:
            raise RunError(str(error)) from error
    try:
        return hydra.utils.instantiate(node, **options)
    except InstantiationException as error:
        raise RunError(f"{key}: {cause_of(error)}") from error
    except SystemExit as error:  # the class is in a script that ends when it is imported
        raise RunError(f"{key}: {node.get('_target_')} left with status {error}") from error


def _describes_class(node: object) -> bool:
    return isinstance(node, DictConfig) and isinstance(node.get("_target_"), str)


def _check_nodes(config: DictConfig) -> None:
    for key, choice in CHOICES.items():
        node = config[key]
        if not (_describes_class(node) or (key in WAYS and isinstance(node, str))):
            group = choice.split("@")[0]
            names = ", ".join(sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))
            spec = f"{key}=SPEC, such as rank:0.15:natural, or " if key in WAYS else ""
            raise RunError(f"{key} describes no class: give {spec}{choice}=NAME, one of {names}")
    for role, rule in config.norm.items():
        if not (isinstance(rule, DictConfig) and {"norm", "radius"} <= rule.keys()):
            raise RunError(
                f"norm.{role} lacks a norm or a radius: give norm.{role}.norm and "
                f"norm.{role}.radius, as in configs/norm"
            )
        for entry in rule:
            if entry not in RULE:
                raise RunError(f"norm.{role}.{entry} is not allowed: a role has {', '.join(RULE)}")
            spec = entry in WAYS and isinstance(rule[entry], str)
            if entry in DESCRIBED and not (spec or _describes_class(rule[entry])):
                hint = DESCRIBED[entry].replace("ROLE", role)
                raise RunError(f"norm.{role}.{entry} describes no class: {hint}")


def _check_ranges(config: DictConfig, overrides: Iterable[str]) -> None:
    for key in ("steps", "log_every", "batch.global_size", "batch.micro_size", "eval.every",
                "checkpoint.keep", "ranks_per_worker", "data.vocab_size",
                "data.train_shards"):  # fmt: skip
        value = OmegaConf.select(config, key)
        if value < 1:
            raise RunError(f"{key}={value} is not allowed: give a whole number of at least 1")
    for key in ("seed", "diagnostics_every", "check_every", "checkpoint.every"):
        value = OmegaConf.select(config, key)
        if value < 0:
            raise RunError(f"{key}={value} is not allowed: give a whole number of at least 0")
    if config.seed >= 2**63:
        raise RunError(f"seed={config.seed} is not allowed: give a whole number below 2^63")
    for key, allowed in ALLOWED.items():
        value = OmegaConf.select(config, key)
        if value not in allowed:
            *names, last = (str(name).lower() for name in allowed)
            raise RunError(f"{key}={value} is not allowed: choose {', '.join(names)} or {last}")
    if config.resume == "elastic" and config.directory is None:
        raise RunError("resume=elastic needs directory=: say which run to resume")
    check_membership(config.membership, config.resume)
    check_plan(config.plan, config.dry_run)
    check_schedule(config, overrides)
    if config.clip_grad_norm is not None and not 0 < config.clip_grad_norm < inf:
        raise RunError(
            f"clip_grad_norm={config.clip_grad_norm} is not allowed: give a number above 0, or null"
        )
    entries = config.model.get("vocab_size")
    if isinstance(entries, int) and entries < config.data.vocab_size:
        raise RunError(
            f"model.vocab_size={entries} is smaller than the "
            f"{config.data.vocab_size} tokens of data={config.data.name}: "
            f"set model.vocab_size to at least {config.data.vocab_size}"
        )


def _explain(error: BaseException, overrides: Iterable[str]) -> str:
    """Hydra's and OmegaConf's errors in one line: what was given, and what is allowed."""
    if isinstance(error, OverrideParseException):
        *_, reason = (line for line in error.message.splitlines()[:-1] if line.strip(" ^"))
        return (
            f"{error.override!r} cannot be read ({reason}): write KEY=VALUE, a list as [a,b], and "
            "text with other signs in quotes"
        )
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give {error.full_key}=VALUE"
    if isinstance(error, ValidationError):
        return f"{error.full_key}={error.value} is not allowed: give {_allowed(error.full_key)}"
    cause = error.__cause__ or error
    unknown = re.search(r"Key '(.+?)' (?:is not in struct|not in)", str(cause))
    if unknown:
        key = getattr(cause, "full_key", None) or unknown[1]
        return f"{key} is not a key of this configuration: {_hint(key, overrides)}"
    text = str(error)
    message = _first_line(error)
    if "Available options in" in text:
        options = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], re.MULTILINE)
        return f"{message}: choose from {', '.join(options)}"
    if message.startswith("Ambiguous value"):
        return f"{message}: add -m to sweep over it, or write a list as [a,b]"
    meant = re.search("^Did you mean.*$", text, re.MULTILINE)
    if meant:
        return f"{message} {meant[0]}"
    return f"{message}: see train.py --help (in {' '.join(overrides)})"


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def _allowed(key: str) -> str:
    """The kind of value that Config declares for a key."""
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(kind)[name]
    if is_dataclass(kind):
        return f"its keys {', '.join(f'{key}.{field.name}' for field in fields(kind))}"
    return KINDS.get(kind, "text or null")


def _hint(key: str, overrides: Iterable[str]) -> str:
    """What a key that does not exist might mean."""
    if re.fullmatch(r"norm\.\w+\.(w2s|s2w)", key):
        return f"write +{key}=SPEC, such as rank:0.15:natural"
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    chosen = [one for one in overrides if re.split("[@=]", one.lstrip("+"))[0] in groups]
    known = list(_dotted_keys(OmegaConf.to_container(_composed(chosen))))
    parent, _, name = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    near = [f"{parent}.{one}".lstrip(".") for one in difflib.get_close_matches(name, siblings, n=1)]
    near += [other for other in known if other.rpartition(".")[2] == name]
    if near:
        return f"did you mean {near[0]}?"
    if siblings and parent:
        return f"{parent} has {', '.join(siblings)}; if its class takes it, write +{key}=VALUE"
    if parent:
        return f"{parent} has no keys"
    return "see train.py --cfg for the keys there are"


def _dotted_keys(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if not key.startswith("_"):
            yield prefix + key
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")
