"""What runs in tests do without: composing the same again, and drawing pictures.

Compositions are remembered by their choice of groups. What is chosen from groups is composed by
Hydra once; values are put on a copy of that, or refused, by Hydra's own code. What cannot be parsed
or chosen is left to Hydra as a whole, which then says why.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from training import config, picture

PARSER = OverridesParser.create()


def take_shortcuts() -> None:
    """In this process, and in its forks."""
    config._composed = remembered(config._composed)
    picture.draw = leave_empty_pictures


def leave_empty_pictures(_: Sequence[Path], folder: Path) -> list[Path]:
    """In place of training.picture.draw, for runs: they import it when they have ended."""
    files = [folder / f"test_loss.{suffix}" for suffix in ("png", "svg")]
    for file in files:
        file.write_bytes(b"")
    return files


def remembered(compose: Callable[[Iterable[str]], DictConfig]) -> Callable:
    """The function that does as `compose`, training.config._composed."""

    @cache
    def chosen(groups: tuple[str, ...], configs: str) -> DictConfig:
        return compose(groups)

    @wraps(compose)
    def composed(overrides: Iterable[str]) -> DictConfig:
        overrides = tuple(overrides)
        groups = tuple(filter(chooses, overrides))
        try:
            result = copy.deepcopy(chosen(groups, str(config.CONFIGS)))
            values = [parsed(one) for one in overrides if one not in groups]
        except HydraException:
            return compose(overrides)
        if any(one.is_sweep_override() for one in values):
            return compose(overrides)
        ConfigLoaderImpl._apply_overrides_to_config(values, result)
        return result

    return composed


def chooses(override: str) -> bool:
    """Whether it chooses a file of a group, and does not give a value."""
    key = override.lstrip("+~").partition("=")[0]
    return "@" in key or (config.CONFIGS / key).is_dir()


@cache
def parsed(override: str):
    return PARSER.parse_override(override)
