"""Finds, reads and merges the layers of a run. The layers are base recipes, the recipe, a profile and the command line.

A layer stores the name of its file, so that the source of every value is known and relative paths can be made absolute.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl.recipe.errors import RecipeError, check_names
from rl.recipe.stages import registered

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"  # beside the package rl, in a clone and in an installation
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Layer:
    """The values of one source, such as a file, before the layers are merged."""

    label: str  # name of this layer in provenance
    where: str  # name of this layer in error messages: its file
    folder: Path  # relative paths in the values start here
    values: DictConfig
    file: Path | None = None
    stages: Mapping[str, DictConfig] = field(default_factory=dict)  # stage -> values for this stage only
    chain: Any = None  # value of the option `chain` (rl/recipe/chain.py)

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The values, as dotted name -> value."""
        return flatten(plain(self.values))

    def for_stage(self, stage: str) -> tuple["Layer", ...]:
        """Returns this layer. If the layer has a section for this stage, also returns a second layer with the values of
        the section."""
        if stage not in self.stages:
            return (self,)
        return self, replace(self, label=f"{self.label}, {stage}", values=self.stages[stage], stages={})

    @cached_property
    def resets(self) -> frozenset[str]:
        """Sections in which this layer deletes the values of earlier layers. A layer that sets rewards.TASK.use deletes
        the earlier values in rewards.TASK. A layer that sets endpoints.NAME.model or endpoints.NAME.url deletes the
        earlier values in endpoints.NAME.serve."""
        rewards = {key.removesuffix(".use") for key in self.flat if re.fullmatch(r"rewards\.[^.]+(\.use)?", key)}
        judges = (re.fullmatch(r"(endpoints\.[^.]+)\.(model|url)", key) for key, value in self.flat.items() if value)
        return frozenset({*rewards, *(f"{judge[1]}.serve" for judge in judges if judge)})

    def touches(self, key: str) -> bool:
        """True in three cases: the layer sets `key`, the layer sets an option inside `key`, or the layer gives a list
        or null to a section that contains `key`."""
        return any(f"{own}.".startswith(f"{key}.") or f"{key}.".startswith(f"{own}.") for own in self.flat)


@dataclass(frozen=True)
class Layers:
    """All layers of a run. Later layers override earlier layers."""

    ordered: tuple[Layer, ...]
    main: str  # the file that error messages show for values that no layer sets

    def origin(self, key: str) -> Layer | None:
        """Returns the last layer that sets exactly this key. If there is no such layer, returns the last layer that
        touches the key."""
        later_first = self._since_reset(key)[::-1]
        exact = (layer for layer in later_first if key in layer.flat)
        return next(exact, None) or next((layer for layer in later_first if layer.touches(key)), None)

    def where(self, key: str) -> str:
        """Returns the name of the file that sets `key`, for error messages."""
        origin = self.origin(key)
        return origin.where if origin else self.main

    def _since_reset(self, key: str) -> tuple[Layer, ...]:
        """Returns the layers that can set `key`: the last layer that resets `key` and all later layers. If no layer
        resets `key`, returns all layers."""
        resetting = [
            index
            for index, layer in enumerate(self.ordered)
            if any(f"{key}.".startswith(f"{section}.") for section in layer.resets)
        ]
        return self.ordered[resetting[-1] if resetting else 0 :]

    def merged(self) -> DictConfig:
        """Merges the layers with OmegaConf, and with two additional rules. Before a layer is merged, the sections in
        its `resets` are emptied. The value ??? removes the value that the option had in earlier layers."""
        merged = OmegaConf.create({})
        for layer in self.ordered:
            for key in layer.resets:
                parent_key, _, name = key.rpartition(".")
                if isinstance(parent := OmegaConf.select(merged, parent_key), DictConfig):
                    parent.pop(name, None)
            try:
                merged.merge_with(layer.values)
                for key in (key for key, value in layer.flat.items() if value == "???"):  # OmegaConf.merge ignores ???
                    OmegaConf.update(merged, key, "???")
            except (TypeError, OmegaConfBaseException) as error:
                problem = f"a list and a mapping of options cannot be merged: {first_line(error)}"
                raise RecipeError(f"{layer.where}: {problem}") from None
        return merged


def written_layers(recipe: Path | None, profile: str | None, overrides: Sequence[str]) -> Layers:
    """Reads the recipe with its base recipes, the profile and the command line. Raises RecipeError if a file cannot be
    read, or if an option name is unknown."""
    files = read(recipe) if recipe else []
    main = files[-1].where if files else COMMAND_LINE
    if profile:
        beside = (recipe.parent if recipe else SHIPPED) / "profiles"
        files += read(_find_profile(profile, beside), f"profile {profile}")
    return Layers((*files, _command_line(overrides)), main)


def read(file: Path, label: str | None = None, derived: tuple[Path, ...] = ()) -> list[Layer]:
    """Reads a YAML file and its base recipes. Returns the layers of the base recipes, and then the layer of the file
    itself.

    Args:
        label: the name of the file's layer in provenance; None: the name of the file.
        derived: the files that have this file as a base recipe. If `derived` contains `file`, base recipes form a
            circle, and RecipeError is raised.
    """
    where = shown(file)
    if (real := file.resolve()) in derived:
        circle = " -> ".join(map(shown, (*derived[derived.index(real) :], real)))
        raise RecipeError(f"{where}: base recipes form a circle: {circle}")
    values = _parse(file, where)
    written = plain(values)
    bases: list[Layer] = []
    if (base := written.pop("base", None)) is not None:
        bases = read(find_recipe(str(base), f"{where}: base: ", file.parent), derived=(*derived, real))
    return [*bases, _layer(label or where, where, file.resolve().parent, OmegaConf.create(written), file)]


def _layer(label: str, where: str, folder: Path, values: DictConfig, file: Path | None = None) -> Layer:
    stages = {name: _section(values, name, where) for name in registered() if name in values}
    given = plain(values)
    chain = given.pop("chain", None)
    general = OmegaConf.create({key: value for key, value in given.items() if key not in stages})
    for part in (general, *stages.values()):
        _unwrap_rewards(part)
        check_names(plain(part), where)
    return Layer(label, where, folder, general, file, stages, chain)


def _section(values: DictConfig, stage: str, where: str) -> DictConfig:
    """Returns the section of a stage. The values of a section apply to this stage only."""
    section = plain(values)[stage]
    if not isinstance(section, dict):
        raise RecipeError(f"{where}: the section {stage} must have options of that stage, such as {stage}.iterations")
    if "stage" in section:
        raise RecipeError(f"{where}: {stage}.stage cannot be set; the section is for the stage {stage}")
    return OmegaConf.create(section)


def _parse(file: Path, where: str) -> DictConfig:
    try:
        values = OmegaConf.load(file)
    except FileNotFoundError:
        raise RecipeError(f"{where}: no such file") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise RecipeError(f"{where}: cannot be read: {first_line(error)}") from None
    if not isinstance(values, DictConfig):
        raise RecipeError(f"{where}: the file contains a list; a recipe must be a mapping of options to values")
    return values


def find_recipe(written: str, where: str = "", folder: Path | None = None) -> Path:
    """Returns the file of the recipe that `written` means. `written` comes from a command line or from another recipe
    (`base:` or `chain:`). The first rule that applies decides:

    1. A shipped recipe's name without folder and suffix (`rlvr`) means the shipped recipe, even if there is a file
       `rlvr`. `./rlvr` means the file with that name.
    2. Everything else is a path: if the file exists, it is the recipe.
    3. A shipped recipe's file name (`rlvr.yaml`) means the shipped recipe. On a command line, the path of a
       shipped recipe in a clone (`recipes/rlvr.yaml`) also means the shipped recipe.

    Args:
        written: a name or a path.
        where: prefix of the error message.
        folder: if `written` comes from another recipe, the folder of that other recipe. A relative path starts there.
            None: `written` comes from a command line.
    Raises:
        RecipeError: if there is no such recipe. The message contains the names of all shipped recipes and, if there
            is one, a similar name.
    """
    shipped = shipped_recipes()
    if written in shipped:
        return shipped[written]
    if (path := (folder or Path()) / written).is_file():
        return path
    name = written.removesuffix(".yaml")
    if folder is None:
        name = name.removeprefix(f"{SHIPPED.name}/")
    if written.endswith(".yaml") and name in shipped:
        return shipped[name]
    beside = {file.stem: str(Path(written).parent / file.name) for file in path.parent.glob("*.yaml")}
    known = beside | {stem: stem for stem in shipped}
    near = get_close_matches(Path(written).stem, known, n=1)
    advice = f"; did you mean {known[near[0]]}?" if near else ""
    raise RecipeError(
        f"{where}no recipe {written}: there is no such file, and the shipped recipes are {', '.join(shipped)}{advice}"
    )


def shipped_recipes() -> dict[str, Path]:
    """Returns the shipped recipes as a mapping from name to file."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def _find_profile(profile: str, beside: Path) -> Path:
    if profile.endswith((".yaml", ".yml")) or "/" in profile:
        return Path(profile)
    folders = [beside, SHIPPED / "profiles"]
    if file := next((path for folder in folders if (path := folder / f"{profile}.yaml").is_file()), None):
        return file
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise RecipeError(f"no profile {profile}; choose from {', '.join(names)}, or give the path of a YAML file")


def _command_line(overrides: Sequence[str]) -> Layer:
    for text in overrides:
        if not re.match(r"[^=\s]+=", text):
            raise RecipeError(f"{COMMAND_LINE}: {text} is not key=value")
        if text.startswith("base="):
            raise RecipeError(f"{COMMAND_LINE}: base belongs in a recipe file")
    try:
        values = OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = f"{' '.join(overrides)} is not valid YAML: {first_line(error)}"
        raise RecipeError(f"{COMMAND_LINE}: {problem}") from None
    return _layer(COMMAND_LINE, COMMAND_LINE, Path.cwd(), values)


def _unwrap_rewards(values: DictConfig) -> None:
    """Replaces a list with one reward by the reward itself, so that its options have names such as
    rewards.TASK.params."""
    rewards = plain(values).get("rewards")
    for task, given in rewards.items() if isinstance(rewards, dict) else ():
        if isinstance(given, list) and len(given) == 1:
            values.rewards[task] = given[0]


def plain(values: DictConfig) -> dict[str, Any]:
    """Returns the values as Python dicts and lists. Interpolations are not replaced by their values."""
    container: Any = OmegaConf.to_container(values)
    return container


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values under dotted names: {"ppo": {"gamma": 1}} -> {"ppo.gamma": 1}. Lists and empty mappings are
    not changed."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def shown(file: Path) -> str:
    """Returns the path that messages show for a file. If the file is inside the working directory, the path is
    relative. Otherwise the path is absolute."""
    path = Path(os.path.abspath(file))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
