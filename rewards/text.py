"""Finds the answer in a response, and normalises text. Rewards that compare text use these functions.

The time of each function is linear in the length of the text.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

WINDOW = 4096
"""By default, only this many characters at the end of an answer are searched."""

_ANSWER = re.compile(r"\banswer[ \t*]{0,4}:[ \t*]{0,4}", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")
_BRACES = re.compile(r"\\boxed\s{0,8}+\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """Returns the content of the `\\boxed{...}` whose closing brace comes last, or None if there is no `\\boxed{...}`.
    Escaped braces are ignored."""
    opened: list[int | None] = []  # for each open brace: the start of its content if the brace opens a box, else None
    span = None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            span = (start, token.start()) if start is not None else span
        elif token[0] == "{":
            opened.append(None)
        elif token[0].startswith("\\boxed"):
            opened.append(token.end())
    return text[slice(*span)].strip() if span else None


def marked_answer(answer: str, window: int = WINDOW) -> str | None:
    """Returns the marked part of an answer: the last `\\boxed{...}` if there is one, else the text after the last
    "Answer:", else the whole answer. Searches only the last `window` characters. Returns None if the answer is longer
    than `window` characters and its last `window` characters contain no `\\boxed{...}` and no "Answer:"."""
    tail = answer[-window:]
    if (boxed := last_boxed(tail)) is not None:
        return boxed
    marks = list(_ANSWER.finditer(tail))
    if marks:
        return tail[marks[-1].end() :].strip()
    return tail.strip() if len(answer) <= window else None


def words_of(message: Mapping[str, Any]) -> str:
    """Returns the text of a chat message, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def visible(text: str) -> str:
    """Returns `text` without control characters, direction marks and lone surrogates. Line breaks and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def folded(text: str) -> str:
    """Converts `text` to Unicode form NFKC, removes invisible characters, and replaces each sequence of white space by
    one blank."""
    text = unicodedata.normalize("NFKC", text)
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())


def normalised(text: str) -> str:
    """Applies `folded`, removes a final period and a `\\text{}` around the whole text, and makes all letters lower
    case."""
    text = folded(text)
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[1].strip()
    return text.removesuffix(".").strip().casefold()
