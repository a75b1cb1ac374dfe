"""Makes the error messages for unknown option names in recipes, and for values that are not allowed.

Every message contains the file, the option, the value and the allowed values. This module looks up options in
rl.config. rl.recipe.layers handles the files.

Tested in tests/rl/recipe/test_resolve.py.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from rl.config import Config, OptionError
from rl.exits import InputError

PLAIN_WORDS = {"an object": "a mapping of options", "valid array": "list"}


class RecipeError(InputError):
    """A recipe, profile or override cannot be used. The message says where the mistake is, what is wrong and what is
    allowed."""


class MissingOption(RecipeError):
    """A mandatory option has no value."""


@dataclass(frozen=True)
class Declared:
    """An option that is declared in rl.config."""

    section: bool  # True if the option contains other options, which are declared too
    meaning: str = ""  # the description of the option in rl.config
    is_list: bool = False  # True if the value may be a list of sections


def declared(values: Mapping[str, Any]) -> dict[str, Declared]:
    """Returns all options that a recipe with these values can have, as dotted name -> option. The options of a reward
    appear once for each task in `values`."""
    files_only = {
        "base": Declared(False, "Recipe that this recipe is based on"),
        "chain": Declared(False, "Recipes of the steps that run one after the other"),
    }
    return {**dict(_declared(Config, values)), **files_only}


def _declared(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Declared]]:
    for name, field in model.model_fields.items():
        key, annotation = f"{prefix}{name}", field.annotation
        section, is_list = _section(annotation), _is_list(annotation)
        yield key, Declared(section is not None, " ".join((field.description or "").split()), is_list)
        if section is None:
            continue
        places = [key]
        if get_origin(annotation) is dict:  # users choose names such as TASK in rewards.TASK.use
            given = values.get(name)
            places = [f"{key}.{free}" for free in (given if isinstance(given, Mapping) else ["NAME"])]
            yield from ((place, Declared(True, is_list=_is_list(get_args(annotation)[1]))) for place in places)
        for place in places:
            yield from _declared(section, {}, f"{place}.")


def _is_list(annotation: Any) -> bool:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_origin(annotation) is tuple


def _section(annotation: Any) -> type[BaseModel] | None:
    """Returns the class that declares the options of a section with this type. The type may be the class itself, or a
    list, mapping or union that contains the class."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for inner in get_args(annotation) if (section := _section(inner))), None)


def check_names(values: Mapping[str, Any], where: str) -> None:
    """Raises RecipeError if `values` contain option names that are not declared. `where` is the file of the values."""
    if problems := [f"{where}: {problem}" for problem in _name_problems(values, declared(values))]:
        raise RecipeError("\n".join(problems))


def _name_problems(values: Mapping[Any, Any], names: Mapping[str, Declared], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in names or "." in str(name):
            yield f"unknown option {key}; {_advice(key, names)}"
        elif names[key].section and isinstance(value, Mapping):
            yield from _name_problems(value, names, f"{key}.")
        elif names[key].section and isinstance(value, list):
            if not names[key].is_list:
                yield f"{key} is a list; it should be a mapping of options"
            for item in value:
                if isinstance(item, Mapping):
                    yield from _name_problems(item, names, f"{key}.")


def _advice(key: str, names: Mapping[str, Declared]) -> str:
    """Suggests a known option for an unknown name. Searches in this order: a similar name in the same section, the same
    last word in any section, a similar last word in any section."""
    if key in names:
        return "in a file it is written nested, with one level of indentation for each dot"
    section, _, word = key.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == section]
    for candidates, cutoff in ((siblings, 0.6), (list(names), 1.0), (list(names), 0.75)):
        words = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        if near := get_close_matches(word, words, n=1, cutoff=cutoff):
            return f"did you mean {words[near[0]]}?"
    return f"{section or 'a recipe'} has the options {', '.join(name.rpartition('.')[2] for name in siblings)}"


def comment_beside(file: Path, key: str) -> str:
    """Returns the comment on the line of `key` in a YAML file, and the comment lines directly below this line."""
    text = file.read_text("utf-8")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for part in key.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for name, value in pairs if name.value == part), None)
    if node is None:
        return ""
    first, *below = text.splitlines()[node.end_mark.line :]
    comments = [first[node.end_mark.column :].strip()]
    for line in below:
        if not line.strip().startswith("#") or not comments[0]:
            break
        comments.append(line.strip())
    return " ".join(comment.lstrip("# ") for comment in comments)


def explain(details: Sequence[ErrorDetails], values: dict[str, Any], where: Callable[[str], str]) -> str:
    """Returns pydantic's errors as text, with one line per option. `where(key)` returns the file that sets the option
    `key`."""
    problems: dict[str, list[str]] = {}
    for detail in details:
        key, text = _problem(detail, values)
        problems.setdefault(key, []).append(text)
    names = declared(values)
    lines = []
    for key, (text, *others) in problems.items():  # pydantic reports one problem for each allowed type
        choices = " or ".join([text, *(other.split(" should be ", 1)[-1] for other in others)])
        lines.append(_line(key, choices, names, where))
    return "\n".join(lines)


def explain_option(problem: OptionError, values: dict[str, Any], where: Callable[[str], str]) -> str:
    """Returns the message for a value that a stage refuses. The message has the same form as the messages of
    `explain`."""
    return _line(problem.key, str(problem), declared(values), where)


def _line(key: str, text: str, names: Mapping[str, Declared], where: Callable[[str], str]) -> str:
    meaning = names[key].meaning.rstrip(".") if key in names else ""
    return f"{where(key)}: {text}{f' ({meaning})' if meaning else ''}"


def _problem(detail: ErrorDetails, values: dict[str, Any]) -> tuple[str, str]:
    """Returns the dotted key of an error, and a message that starts with this key."""
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, OptionError):
        return cause.key, str(cause)
    key, value = _place(detail, values)
    if detail["type"] == "missing":
        return key, f"{key} is missing"
    message = detail["msg"][max(0, detail["msg"].find("should ")) :]
    for technical, plain in PLAIN_WORDS.items():
        message = message.replace(technical, plain)
    return key, f"{key} = {json.dumps(value, ensure_ascii=False)} {message}"


def _place(detail: ErrorDetails, values: dict[str, Any]) -> tuple[str, Any]:
    """Returns the dotted key of an error and the value of this key. If the option has a union type, pydantic adds names
    of types to the key; the returned key does not have these names."""
    parts: list[str] = []
    value: Any = values
    for part in detail["loc"]:
        items = dict(enumerate(value)) if isinstance(value, list) else value
        if part == 0 and isinstance(value, dict):  # pydantic checks a single mapping as a list of one item
            continue
        if isinstance(items, dict) and part in items:
            value = items[part]
        elif detail["type"] != "missing":
            break
        parts.append(str(part))
    return ".".join(parts), value
