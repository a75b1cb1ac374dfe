"""Reads the JSON object in a judge's reply, as judges write it: with raw line breaks or LaTeX inside strings, in single
quotes, in a fence inside prose, after thinking, with numbers as text or with extra keys.

The library json_repair repairs JSON that is not valid. This module decides which object is the verdict.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

import json_repair
from pydantic import BaseModel, ValidationError

MOST_OBJECTS = 32  # maximum number of objects in a reply or in a judged text that are looked at
LONGEST = 1 << 17  # maximum number of characters of a reply

_AFTER_THINKING = re.compile(r"</think(?:ing)?>|<\|channel\|>final\s{0,4}<\|message\|>|\bassistantfinal", re.IGNORECASE)
_OPENING = re.compile(r"\{\s{0,100}[\"'\u201c\u2018]")
_LATEX = re.compile(r'\\(?!["\\/bfnrtu]|$)|\\(?=[bfnrt][a-zA-Z]{2})|\\(?=u(?![0-9a-fA-F]{4}))')

Answer = TypeVar("Answer", bound=BaseModel)


class Unparsable(Exception):
    """The model's reply does not contain exactly one verdict of the form that was asked for."""


class Unfinished(Unparsable):
    """The model used all its tokens before its reply was complete."""


def parsed(text: str, answer: type[Answer], judged: Sequence[str] = ()) -> Answer:
    """Returns the one `answer` object in a model's reply.

    judged  texts that the model was shown. An object in the reply that also stands in one of these texts is a
            quotation, and never the verdict

    Keys and words are compared without regard to case, numbers may be texts, and other keys are ignored. Raises
    Unparsable if there is no such object, or if there are two that differ in more than their `reasoning`.
    """
    if len(text) > LONGEST:
        raise Unparsable(f"the reply has {len(text)} characters; the limit is {LONGEST}")
    thought = None
    for thought in _AFTER_THINKING.finditer(text):  # noqa: B007  # only the last match is used
        pass
    text = text[thought.end() :] if thought else text
    quotable = [found for one in judged for found in _objects(one, answer)]
    why, verdicts = "no JSON object", []
    for found in _objects(text, answer):
        if found in quotable:
            why = "it only quotes an object from the judged text"
            continue
        try:
            verdicts.append(answer.model_validate(_folded(found, answer)))
        except ValidationError as e:
            first = e.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            why = f"{place + ': ' if place else ''}{first['msg']}"
    if len({json.dumps(one.model_dump(exclude={"reasoning"}), sort_keys=True) for one in verdicts}) > 1:
        raise Unparsable(f"the reply has {len(verdicts)} different {answer.__name__} objects")
    if not verdicts:
        raise Unparsable(f"the reply is no {answer.__name__}: {why}")
    return verdicts[-1]


def _objects(text: str, answer: type[BaseModel]) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects in a text. Objects inside other objects are not yielded."""
    end = 0
    for _ in range(MOST_OBJECTS):
        opening = _OPENING.search(text, end)
        end = _closing(text, opening.start()) if opening else None
        if opening is None or end is None:
            return
        found = _read(text[opening.start() : end], answer)
        if isinstance(found, dict):
            yield found


def _closing(text: str, start: int) -> int | None:
    """Returns the position after the brace that closes the object at `start`. Braces inside strings do not count. If
    this finds no end, because the quotes are not balanced, counts all braces. Returns None if no brace closes the
    object."""
    for strings in (True, False):
        depth, inside, position = 0, False, start
        while position < len(text):
            character = text[position]
            if inside and character == "\\":
                position += 1
            elif character == '"' and strings:
                inside = not inside
            elif not inside and character in "{}":
                depth += 1 if character == "{" else -1
                if depth == 0:
                    return position + 1
            position += 1
    return None


def _read(text: str, answer: type[BaseModel]) -> Any:
    """Returns the value of a JSON text, repaired if necessary. Returns None for a text that gives a field of `answer`
    two different values, because a repair could then choose the wrong one."""
    for candidate in (text, _LATEX.sub(r"\\\\", text)):
        try:
            return json.loads(candidate, strict=False)
        except (ValueError, RecursionError):
            continue
    for field, information in answer.model_fields.items():
        if information.annotation is not str:
            pattern = rf"[\"'\u201c]{field}[\"'\u201d]\s{{0,20}}:\s{{0,20}}[\"'\u201c]?([\w.-]{{1,40}})"
            if len({value.casefold() for value in re.findall(pattern, text, re.IGNORECASE)}) > 1:
                return None
    try:
        return json_repair.loads(_LATEX.sub(r"\\\\", text))
    except (ValueError, RecursionError):
        return None


def _folded(found: dict[str, Any], answer: type[BaseModel]) -> dict[str, Any]:
    """Returns the fields of `answer` in an object, with keys and words as `answer` writes them."""
    by_key = {str(key).strip().casefold().replace(" ", "_"): value for key, value in found.items()}
    folded = {}
    for name, field in answer.model_fields.items():
        if name not in by_key:
            continue
        value = by_key[name]
        if isinstance(value, str) and field.annotation is not str:
            value = value.strip(" \t\n*.\"'`")
            words = [one for one in get_args(field.annotation) if get_origin(field.annotation) is Literal]
            value = next((one for one in words if one.casefold() == value.casefold()), value)
        elif isinstance(value, bool) and field.annotation is not bool:
            value = str(value)  # True is no grade
        folded[name] = value
    return folded
