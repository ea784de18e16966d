"""Hydra's compositions, remembered by their choice of groups, so that tests compose in no time.

What is chosen from groups is composed by Hydra once; values are put on a copy of that by Hydra's
own code. What cannot be put there is left to Hydra as a whole, which then says why.
"""

import copy
from collections.abc import Callable, Iterable
from functools import cache, wraps

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from training import config

PARSER = OverridesParser.create()


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
            ConfigLoaderImpl._apply_overrides_to_config(values, result)
        except HydraException:
            return compose(overrides)
        return result

    return composed


def chooses(override: str) -> bool:
    """Whether it chooses a file of a group, and does not give a value."""
    key = override.lstrip("+~").partition("=")[0]
    return "@" in key or (config.CONFIGS / key).is_dir()


@cache
def parsed(override: str):
    return PARSER.parse_override(override)
