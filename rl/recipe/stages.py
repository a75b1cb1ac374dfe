"""Gives recipes access to the registered stages: their names, default values and rules.

The stages themselves are in stages/, which the package rl must not import. Installed packages register their stages in
the entry point group `rl.stages`. Each entry point refers to a mapping from stage names to classes. The classes have
the methods and attributes of stages.base.Stage.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any, Protocol

from rl.config import Config, CurationOptions, OptionError

GROUP = "rl.stages"


class StageRules(Protocol):
    """The attributes and methods of stages.base.Stage that the package rl uses."""

    name: str
    defaults: Mapping[str, Any]
    own_options: tuple[str, ...]
    own_metrics: Mapping[str, str]

    def option_problems(self, config: Config) -> Iterable[OptionError]: ...
    def curation_problem(self, config: Config, curation: CurationOptions) -> str | None: ...


def registered() -> dict[str, StageRules]:
    """Returns all stages by name. Raises RuntimeError if no installed package registers a stage."""
    return {name: rules for registry in _registries() for name, rules in registry.items()}


@cache
def _registries() -> tuple[Mapping[str, StageRules], ...]:
    points = entry_points(group=GROUP)
    if not points:
        raise RuntimeError(f"no entry point of the group {GROUP!r} is installed: run make env, or pip install .")
    return tuple(point.load() for point in points)


def option_problems(config: Config) -> Iterator[OptionError]:
    """Returns a problem for each option whose value does not fit the config's stage."""
    stages = registered()
    own = stages[config.stage]
    for name, rules in stages.items():
        for key in rules.own_options:
            if attrgetter(key)(config) and key not in own.own_options:
                yield OptionError(key, f"is for the stage {name}, but the stage of this recipe is {config.stage}")
    yield from own.option_problems(config)
