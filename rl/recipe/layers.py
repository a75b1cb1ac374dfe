"""The layers of a run: base recipes, the recipe, a profile, the command line. Finds, reads and merges them.

A layer remembers its file, so that every value can be traced and every relative path understood.
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

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"  # beside the package rl, in a clone and installed
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Layer:
    """Values of one origin, not merged with any other."""

    label: str  # in provenance
    where: str  # in messages: the file
    folder: Path  # that its paths are relative to
    values: DictConfig
    file: Path | None = None
    stages: Mapping[str, DictConfig] = field(default_factory=dict)  # values for single stages
    chain: Any = None  # recipes that follow each other, as written (rl/recipe/chain.py)

    @cached_property
    def flat(self) -> dict[str, Any]:
        return flatten(plain(self.values))

    def for_stage(self, stage: str) -> tuple["Layer", ...]:
        """The layer, and what it says for this stage only."""
        if stage not in self.stages:
            return (self,)
        return self, replace(self, label=f"{self.label}, {stage}", values=self.stages[stage], stages={})

    @cached_property
    def begun_anew(self) -> frozenset[str]:
        """Of what earlier layers say does not count any more: options of a reward whose `use` this one gives, and how
        to serve a judge whose `model` or `url` it gives."""
        rewards = {key.removesuffix(".use") for key in self.flat if re.fullmatch(r"rewards\.[^.]+(\.use)?", key)}
        judges = (re.fullmatch(r"(endpoints\.[^.]+)\.(model|url)", key) for key, value in self.flat.items() if value)
        return frozenset({*rewards, *(f"{judge[1]}.serve" for judge in judges if judge)})

    def touches(self, key: str) -> bool:
        """Whether the layer gives `key`, something below it, or a list or null in whose place it stands."""
        return any(f"{own}.".startswith(f"{key}.") or f"{key}.".startswith(f"{own}.") for own in self.flat)


@dataclass(frozen=True)
class Layers:
    """All layers of a run, later ones winning."""

    ordered: tuple[Layer, ...]
    main: str  # where a value that nobody gave would belong

    def origin(self, key: str) -> Layer | None:
        """The last layer that gives exactly this key; failing that, the last that has to do with it."""
        later_first = self._in_force(key)[::-1]
        exact = (layer for layer in later_first if key in layer.flat)
        return next(exact, None) or next((layer for layer in later_first if layer.touches(key)), None)

    def where(self, key: str) -> str:
        """The file to look in about `key`."""
        origin = self.origin(key)
        return origin.where if origin else self.main

    def _in_force(self, key: str) -> tuple[Layer, ...]:
        """The layers whose word on `key` counts: the last that begins it anew, and those above."""
        beginning = [
            index
            for index, layer in enumerate(self.ordered)
            if any(f"{key}.".startswith(f"{anew}.") for anew in layer.begun_anew)
        ]
        return self.ordered[beginning[-1] if beginning else 0 :]

    def merged(self) -> DictConfig:
        """OmegaConf's merge, except that saying a task's `use`, or a list, drops what was said of its reward before, a
        judge's `model` or `url` how to serve it, and a ??? what was said of its option."""
        merged = OmegaConf.create({})
        for layer in self.ordered:
            for key in layer.begun_anew:
                above, _, last = key.rpartition(".")
                if isinstance(holder := OmegaConf.select(merged, above), DictConfig):
                    holder.pop(last, None)
            try:
                merged.merge_with(layer.values)
                for key in (key for key, value in layer.flat.items() if value == "???"):  # merging would ignore it
                    OmegaConf.update(merged, key, "???")
            except (TypeError, OmegaConfBaseException) as error:
                problem = f"a list stands where others have options, or the reverse: {first_line(error)}"
                raise RecipeError(f"{layer.where}: {problem}") from None
        return merged


def written_layers(recipe: Path | None, profile: str | None, overrides: Sequence[str]) -> Layers:
    """Everything a person wrote, names checked."""
    files = read(recipe) if recipe else []
    main = files[-1].where if files else COMMAND_LINE
    if profile:
        beside = (recipe.parent if recipe else SHIPPED) / "profiles"
        files += read(_find_profile(profile, beside), f"profile {profile}")
    return Layers((*files, _command_line(overrides)), main)


def read(file: Path, label: str | None = None, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The layer of a YAML file, after those of the recipes it is based on."""
    where = shown(file)
    if (real := file.resolve()) in above:
        circle = " -> ".join(map(shown, (*above[above.index(real) :], real)))
        raise RecipeError(f"{where}: base recipes go in a circle: {circle}")
    values = _parse(file, where)
    written = plain(values)
    base = written.get("base")
    based = [] if base is None else read(find_recipe(str(base), f"{where}: base: ", file.parent), above=(*above, real))
    values = OmegaConf.create({key: value for key, value in written.items() if key != "base"})
    return [*based, _layer(label or where, where, file.resolve().parent, values, file)]


def _layer(label: str, where: str, folder: Path, values: DictConfig, file: Path | None = None) -> Layer:
    stages = {name: _section(values, name, where) for name in registered() if name in values}
    said = plain(values)
    chain = said.pop("chain", None)
    general = OmegaConf.create({key: value for key, value in said.items() if key not in stages})
    for part in (general, *stages.values()):
        _unwrap_rewards(part)
        check_names(plain(part), where)
    return Layer(label, where, folder, general, file, stages, chain)


def _section(values: DictConfig, stage: str, where: str) -> DictConfig:
    """What is said for one stage: options as of the whole run."""
    section = plain(values)[stage]
    if not isinstance(section, dict):
        raise RecipeError(f"{where}: {stage} holds the options of that stage, such as {stage}.iterations")
    if "stage" in section:
        raise RecipeError(f"{where}: {stage}.stage cannot be; the section is for the stage {stage}")
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
        raise RecipeError(f"{where}: holds a list; a recipe is a mapping of options to values")
    return values


def find_recipe(written: str, where: str = "", folder: Path | None = None) -> Path:
    """Returns the file of a recipe that a command line or another recipe names. The first rule that applies decides:

    1. A shipped recipe's name without folder and suffix (`rlvr`) is the shipped recipe, even beside a file `rlvr`.
       A file of that name is meant by `./rlvr`.
    2. Everything else is a path: if the file exists, it is the recipe.
    3. A shipped recipe's file name (`rlvr.yaml`) is the shipped recipe; on a command line also its path in a clone
       (`recipes/rlvr.yaml`).

    Args:
        written: a name or a path.
        where: prefix of the error message.
        folder: that paths are relative to, if a recipe file names the recipe; None for a command line.
    Raises:
        RecipeError: no such recipe. The message has the shipped ones and the nearest name.
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
        f"{where}no recipe {written}: there is no such file, and the shipped ones are {', '.join(shipped)}{advice}"
    )


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of each shipped recipe."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def _find_profile(profile: str, beside: Path) -> Path:
    if profile.endswith((".yaml", ".yml")) or "/" in profile:
        return Path(profile)
    folders = [beside, SHIPPED / "profiles"]
    if found := next((path for folder in folders if (path := folder / f"{profile}.yaml").is_file()), None):
        return found
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise RecipeError(f"no profile {profile}; there is {', '.join(names)}, or give the path of a YAML file")


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
    """A task may give its reward as a list; one of one is that reward, whose options then can be named."""
    rewards = plain(values).get("rewards")
    for task, given in rewards.items() if isinstance(rewards, dict) else ():
        if isinstance(given, list) and len(given) == 1:
            values.rewards[task] = given[0]


def plain(values: DictConfig) -> dict[str, Any]:
    """As Python's own dicts and lists; interpolations stay text."""
    container: Any = OmegaConf.to_container(values)
    return container


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"ppo": {"gamma": 1}} -> {"ppo.gamma": 1}. Lists and empty mappings stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def shown(file: Path) -> str:
    """The file as a person would write it from here."""
    path = Path(os.path.abspath(file))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
