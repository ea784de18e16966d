"""From a command line to checked configurations: Hydra composition, sweeps and run names."""

import argparse
import difflib
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.workers import RunError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
# What does not change a run's numbers, and so not its name.
INCIDENTAL = (
    *("runs", "directory", "log_every", "diagnostics_every", "check_every", "fail_fast"),
    *("wandb", "label", "checkpoint", "resume", "dry_run"),
)


@dataclass
class Batch:
    sequences: int
    per_forward: int


@dataclass
class Schedule:
    warmup: float
    cooldown: float


@dataclass
class Eval:
    every: int
    tokens: int


@dataclass
class Checkpoint:
    every: int
    keep: int
    asynchronous: bool


@dataclass
class Data:
    name: str
    vocab_size: int
    train: str
    train_shards: int
    test: str
    rebuild: str


@dataclass
class Wandb:
    mode: str
    project: str


@dataclass
class Config:
    """The types of configs/config.yaml. `Any` nodes name a class, which checks its own values."""

    model: Any
    optimizer: Any
    norm: Any
    w2s: Any
    s2w: Any
    worker_size: int
    dry_run: bool
    seed: int
    steps: int
    log_every: int
    diagnostics_every: int
    check_every: int
    compile: bool
    label: str | None
    runs: str
    directory: str | None
    resume: str
    fail_fast: bool
    data: Data
    batch: Batch
    schedule: Schedule
    eval: Eval
    checkpoint: Checkpoint
    wandb: Wandb


@dataclass(frozen=True)
class Job:
    """One run: its overrides as given and its configuration."""

    overrides: tuple[str, ...]
    config: DictConfig

    def name(self, workers: int) -> str:
        """What was overridden, and a short hash of the configuration and the number of workers."""
        resolved = OmegaConf.to_container(self.config, resolve=True)
        digest = hashlib.sha256(
            json.dumps([_essential(resolved), workers], sort_keys=True).encode()
        ).hexdigest()
        told = [
            override.removeprefix("compressor@")
            for override in self.overrides
            if re.split(r"[.=]", override.lstrip("+~"))[0] not in INCIDENTAL
        ]
        readable = re.sub(r"[^\w.=,@+~-]+", "-", ",".join(told) or "default")[:100]
        return f"{readable}-{digest[:8]}"


def what_matters(config: dict) -> dict:
    """What a run's numbers follow from: values by dotted key."""
    flat, left = {}, list(_essential(config).items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{name}", inner) for name, inner in value.items()]
        else:
            flat[key] = value
    return flat


def _essential(config: dict) -> dict:
    return {key: value for key, value in config.items() if key not in INCIDENTAL}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of train.py."""
    groups = "\n".join(
        f"  {folder.name:<12}{', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}"
        for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    )
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a GPT with EF21-Muon. Launch with torchrun, one process a worker.",
        epilog=f"config groups (compressor@w2s=, compressor@s2w= pick a direction):\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="sweep over comma-separated values"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="SECONDS",
        help="the longest wait for another worker (default %(default)s)",
    )
    parser.add_argument(
        "--cfg", action="store_true", help="print the resolved configuration of each job and stop"
    )
    return parser.parse_intermixed_args(arguments)


def sweep(overrides: list[str], multirun: bool) -> list[tuple[str, ...]]:
    """The overrides of every job: the product of all comma-separated values with `multirun`.

    Those that vary come first, so that a run's name begins with what sets it apart. Raises RunError
    for an override that Hydra cannot parse.
    """
    if not multirun:
        return [tuple(overrides)]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        parsed.sort(key=lambda one: not one.is_sweep_override())
        choices = [
            [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
            if one.is_sweep_override()
            else [one.input_line]
            for one in parsed
        ]
    except HydraException as error:
        raise RunError(_one_line(error)) from error
    return list(itertools.product(*choices))


def compose(overrides: tuple[str, ...]) -> Job:
    """Compose and check one job's configuration.

    Raises RunError for unknown keys, for values of the wrong type and for those out of range.
    """
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra.compose("config", list(overrides))
        config = OmegaConf.merge(OmegaConf.structured(Config), composed)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise RunError(_one_line(error)) from error
    _check_ranges(config)
    return Job(tuple(overrides), config)


def build(node: DictConfig, key: str, **options):
    """The object that a configuration node describes.

    Raises RunError that names the key where the class refuses its values.
    """
    try:
        return hydra.utils.instantiate(node, **options)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise RunError(f"{key}: {_one_line(cause)}") from error


def _check_ranges(config: DictConfig) -> None:
    for key in ("steps", "log_every", "batch.sequences", "batch.per_forward", "eval.every",
                "checkpoint.keep", "worker_size"):  # fmt: skip
        value = OmegaConf.select(config, key)
        if value < 1:
            raise RunError(f"{key}={value} is not allowed: give a whole number of at least 1")
    for key in ("schedule.warmup", "schedule.cooldown"):
        value = OmegaConf.select(config, key)
        if not 0 <= value <= 1:
            raise RunError(f"{key}={value} is not allowed: give a share of the steps, 0 to 1")
    for key in ("seed", "diagnostics_every", "check_every", "checkpoint.every"):
        value = OmegaConf.select(config, key)
        if value < 0:
            raise RunError(f"{key}={value} is not allowed: give a whole number of at least 0")
    if config.resume not in ("none", "auto", "elastic"):
        raise RunError(f"resume={config.resume} is not allowed: choose none, auto or elastic")
    if config.resume == "elastic" and config.directory is None:
        raise RunError("resume=elastic needs directory=: say which run goes on")
    if config.wandb.mode not in ("disabled", "offline", "online"):
        raise RunError(
            f"wandb.mode={config.wandb.mode} is not allowed: choose disabled, offline or online"
        )
    if config.data.vocab_size > config.model.vocab_size:
        raise RunError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{config.data.vocab_size} tokens of data={config.data.name}: "
            f"set model.vocab_size to at least {config.data.vocab_size}"
        )


def _one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages without their continuation lines, with the key they miss."""
    text = str(error.__cause__ or error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    full_key = next((line.split(": ", 1)[1] for line in lines if line.startswith("full_key:")), "")
    unknown = re.search(r"Key '(\w+)' (?:is not in struct|not in)", text)
    message = lines[0]
    if "Available options in" in text:
        options = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], re.MULTILINE)
        message += f": choose from {', '.join(options)}"
    if message.startswith("Ambiguous value"):
        message += ": add -m to sweep over it, or write a list as [a,b]"
    if unknown:
        near = difflib.get_close_matches(unknown[1], _known_keys(), n=1)
        hint = f"did you mean {near[0]}?" if near else "see train.py --cfg for the keys there are"
        return f"{full_key or unknown[1]} is not a key of this configuration: {hint}"
    return f"{full_key}: {message}" if full_key else message


def _known_keys() -> set[str]:
    text = "\n".join(path.read_text() for path in CONFIGS.rglob("*.yaml"))
    return set(re.findall(r"^\s*(\w+):", text, re.MULTILINE))
