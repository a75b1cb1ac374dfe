"""Makes one checked Config from the recipe, the profile and the command line, and records the source of each value.

Later layers override earlier layers: stage defaults < `base:` recipe < recipe < profile < key=value. OmegaConf
reads and merges the layers, and the classes of rl.config check the result. A relative path starts at the folder of the
file that contains the path; in key=value, it starts at the working directory. All paths become absolute, so that a
saved recipe does not depend on the working directory.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from rl.config import Config
from rl.recipe.errors import MissingOption, RecipeError, comment_beside, explain, explain_option
from rl.recipe.layers import SHIPPED, Layer, Layers, first_line, flatten, plain, read, written_layers
from rl.recipe.stages import option_problems, registered
from rl.recipe.stored_secrets import secret_variables

__all__ = ["Change", "MissingOption", "RecipeError", "Resolved", "describe", "differences", "load"]

PATHS = (
    "model.path",
    "model.critic",
    "model.chat_template",
    "data.train",
    "data.eval",
    "data.picture_folders",
    "curate.decontamination.against",
    "synthesis.template",
)
LOCAL_PATHS = ("critic", "template", "chat_template", "picture_folders")  # of PATHS, these cannot be hub ids
DATA_FILE = (".json", ".jsonl", ".jsonl.gz", ".parquet")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")  # [owner/]name, and [:split] for a data set


@dataclass(frozen=True)
class Resolved:
    """A checked config, and the source of each of its values.

    `provenance` maps each dotted key to the layer that set it: "recipes/rlvr.yaml", "profile cpu", "command line",
    "default of stage rlvr" or "default".
    """

    config: Config
    provenance: Mapping[str, str]

    def plain(self) -> dict[str, Any]:
        """Returns every value in a form that JSON can store. Paths are absolute. A secret is stored only as the name of
        its environment variable. Loading a recipe with these values gives the same config."""
        return self.config.model_dump(mode="json")

    def yaml(self) -> str:
        """Returns `plain()` as the text of a recipe.yaml."""
        return yaml_of(self.plain())


def yaml_of(values: Mapping[str, Any]) -> str:
    """Returns the text of a recipe with these values. Loading the recipe gives the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dict(values))))


class Change(NamedTuple):
    """An option whose value differs between two configs."""

    key: str
    saved: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.saved)} -> {_short(self.new)}"


def load(
    recipe: Path | None,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    stage: str | None = None,
) -> Resolved:
    """Merges all layers and checks the result.

    Args:
        recipe: the YAML file; None if the overrides have all values.
        profile: name of a file in `profiles/` (beside the recipe, or shipped), or the path of a file.
        overrides: texts `key=value` with values in YAML.
        stage: the stage to run; a recipe of another stage is refused.
    Raises:
        RecipeError: if the recipe cannot be used. The message tells the user everything that is needed to correct the
            recipe. Unknown names are reported first, then mandatory values that are missing (MissingOption), then
            values that do not fit.
    """
    written = written_layers(Path(recipe) if recipe else None, profile, overrides)
    if chained := [layer for layer in written.ordered if layer.chain is not None]:
        raise RecipeError(
            f"{chained[-1].where}: the recipe is a chain, which only rl.run can run; give a recipe of one stage"
        )
    chosen = stage_of(written, stage)
    if unused := [name for name in written.ordered[-1].stages if name != chosen]:
        raise RecipeError(f"command line: {unused[0]}.* is for the stage {unused[0]}, but the run's stage is {chosen}")
    return resolve(written, chosen, profile)


def resolve(written: Layers, stage: str, profile: str | None) -> Resolved:
    """Returns the config of a stage from the layers of a run. Raises RecipeError in the same cases as `load`."""
    ordered = [part for layer in written.ordered for part in layer.for_stage(stage)]
    layers = Layers((_stage_layer(stage), *ordered), written.main)
    merged = layers.merged()
    _check_nothing_missing(merged, layers, profile)
    values = _interpolated(merged, layers)
    _make_paths_absolute(values, layers)
    config = _validated(values, layers)
    origins = {key: layers.origin(key) for key in flatten(config.model_dump(mode="json"))}
    return Resolved(config, {key: layer.label if layer else "default" for key, layer in origins.items()})


def describe(resolved: Resolved, section: Callable[[str], bool] = lambda name: True) -> str:
    """Returns one line per option: name, value, and source of the value.

    Args:
        section: a function that returns True for the sections to show. A section is the first part of the dotted name.
    """
    flat = flatten(resolved.plain())
    values = {key: _short(value) for key, value in flat.items() if section(key.partition(".")[0])}
    name_width, value_width = max(map(len, values)), min(40, max(map(len, values.values())))
    return "\n".join(
        f"{key:<{name_width}}  {value:<{value_width}}  {resolved.provenance[key]}" for key, value in values.items()
    )


def differences(saved: Config, new: Config) -> list[Change]:
    """Returns the options whose values differ between two configs. They are in the order of their declaration."""
    before, after = (flatten(config.model_dump(mode="json")) for config in (saved, new))
    changes = (Change(key, before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after]))
    return [change for change in changes if change.saved != change.new]


def stage_of(layers: Layers, required: str | None = None) -> str:
    """Returns the stage that the layers set, or `required` if no layer sets a stage.

    Args:
        required: the value of --stage; None without --stage.
    Raises: MissingOption if no layer sets a stage and `required` is None. RecipeError if the stage is unknown, or if
        it is not the required stage.
    """
    naming = [layer for layer in layers.ordered if "stage" in layer.values]
    stage = str(naming[-1].values.stage) if naming else required
    stages = ", ".join(registered())
    if stage is None:
        raise MissingOption(f"{layers.main}: stage is missing; it is one of {stages}")
    if stage not in registered():
        where = naming[-1].where if naming else "--stage"
        raise RecipeError(f"{where}: there is no stage {stage}; the stages are {stages}")
    if required and stage != required:
        raise RecipeError(f"{naming[-1].where}: the recipe's stage is {stage}, so --stage {required} cannot be used")
    return stage


def _stage_layer(stage: str) -> Layer:
    label = f"default of stage {stage}"
    values = {"stage": stage, **registered()[stage].defaults}
    return Layer(label, label, Path.cwd(), OmegaConf.create(values))


def _check_nothing_missing(merged: DictConfig, layers: Layers, profile: str | None) -> None:
    messages = []
    for key in [key for key, value in flatten(plain(merged)).items() if value == "???" or value == ["???"]]:
        origin = layers.origin(key)
        comment = comment_beside(origin.file, key) if origin and origin.file else ""
        problem = f"{key} is ???, which only you can fill in{': ' if comment else ''}{comment}"
        advice = "" if profile else _profile_advice(key)
        messages.append(f"{layers.where(key)}: {problem}\nPut the value in a recipe or add {key}=VALUE{advice}.")
    if messages:
        raise MissingOption("\n".join(messages))


def _profile_advice(key: str) -> str:
    """Returns advice for the user: the names of the shipped profiles that set `key`."""
    files = sorted((SHIPPED / "profiles").glob("*.yaml"))
    names = [file.stem for file in files if read(file)[-1].touches(key)]
    return f", or try the small example of --profile {' or '.join(names)}" if names else ""


def _interpolated(merged: DictConfig, layers: Layers) -> dict[str, Any]:
    for key, variable in secret_variables(plain(merged)):
        problem = f"{key} takes its value from {variable}, so this secret would be stored in recipe.yaml"
        raise RecipeError(f"{layers.where(key)}: {problem}; give the name of the variable instead, without oc.env")
    try:
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        problem = f"{key} cannot be resolved: {first_line(error)}"
        raise RecipeError(f"{layers.where(key)}: {problem}") from None
    return values


def _make_paths_absolute(values: dict[str, Any], layers: Layers) -> None:
    for key in PATHS:
        *sections, name = key.split(".")
        parent, origin = values, layers.origin(key)
        for section in sections:
            parent = parent.get(section) if isinstance(parent, dict) else None
        if isinstance(parent, dict) and origin:
            parent[name] = _absolute(parent.get(name), origin.folder, always=name in LOCAL_PATHS)
    rewards = values.get("rewards")
    for task, given in rewards.items() if isinstance(rewards, dict) else ():
        for reward in given if isinstance(given, list) else [given]:
            _make_reward_absolute(reward, f"rewards.{task}", layers)
    if isinstance(curate := values.get("curate"), dict):
        for name in ("checkability", "relevance"):
            _make_reward_absolute(curate.get(name), f"curate.{name}", layers)
    endpoints = values.get("endpoints")
    for name, endpoint in endpoints.items() if isinstance(endpoints, dict) else ():
        origin = layers.origin(f"endpoints.{name}.model")
        if (
            isinstance(endpoint, dict) and endpoint.get("url") is None and origin
        ):  # without a url, the model is a folder or hub id
            endpoint["model"] = _absolute(endpoint.get("model"), origin.folder)


def _make_reward_absolute(reward: Any, key: str, layers: Layers) -> None:
    """Makes the paths of a reward absolute, in place. The paths are the file in `use`, parameters that begin with ./,
    ../ or ~/, and parameters that are the path of an existing file."""
    if not isinstance(reward, dict):
        return

    def folder(name: str) -> Path:
        origin = layers.origin(f"{key}.{name}")
        return origin.folder if origin else Path.cwd()

    use, params = reward.get("use"), reward.get("params")
    if isinstance(use, str) and ".py:" in use:
        file, _, name = use.rpartition(":")
        reward["use"] = f"{_absolute(file, folder('use'), always=True)}:{name}"
    if isinstance(params, dict):
        reward["params"] = {n: _absolute_if_path(value, folder(f"params.{n}")) for n, value in params.items()}
    for penalty in reward.get("penalties") or ():
        _make_reward_absolute(penalty, f"{key}.penalties", layers)


def _absolute_if_path(value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or len(value) > 255 or "\n" in value:
        return value
    is_path = value.startswith(("./", "../", "~/")) or (("/" in value or "." in value) and (folder / value).exists())
    return _absolute(value, folder, always=True) if is_path else value


def _absolute(value: Any, folder: Path, *, always: bool = False) -> Any:
    """Returns an absolute path if the value is a path. Other values, such as hub ids, are returned unchanged."""
    if isinstance(value, list):
        return [_absolute(item, folder, always=always) for item in value]
    if isinstance(value, dict) and "path" in value:
        return value | {"path": _absolute(value["path"], folder, always=always)}
    if isinstance(value, str) and value and (always or _is_path(value, folder)):
        return os.path.abspath(folder / os.path.expanduser(value))
    return value


def _is_path(text: str, folder: Path) -> bool:
    if text.startswith((".", "/", "~")) or text.endswith(DATA_FILE) or not HUB_ID.fullmatch(text):
        return True
    return (folder / text.partition(":")[0]).exists()


def _validated(values: dict[str, Any], layers: Layers) -> Config:
    """Converts the values to JSON and checks them. In strict mode, pydantic accepts a JSON list as a tuple and a JSON
    string as a path, but it does not accept a string as a number."""
    sections = {"model": {}, "data": {}}  # if `model` is missing, the error then says model.path
    try:
        config = Config.model_validate_json(json.dumps(sections | values, default=str))
    except ValidationError as error:
        details = error.errors(include_url=False)
        kind = MissingOption if all(detail["type"] == "missing" for detail in details) else RecipeError
        raise kind(explain(details, values, layers.where)) from None
    for problem in option_problems(config):
        raise RecipeError(explain_option(problem, values, layers.where))
    return config


def _escaped(value: Any) -> Any:
    """Escapes `${`, which OmegaConf would read as an interpolation, and the backslashes before it."""
    if isinstance(value, dict):
        return {name: _escaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _short(value: Any) -> str:
    """Returns text unchanged, and other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
