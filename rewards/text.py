"""Reading an answer out of a response: what the rewards that compare text share. Linear in time."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

WINDOW = 4096
"""Characters of an answer, counted from its end, that rewards look at."""

_ANSWER = re.compile(r"\banswer[ \t*]{0,4}:[ \t*]{0,4}", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")
_BRACES = re.compile(r"\\boxed\s{0,8}+\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """What stands in the `\\boxed{...}` that closes last, or None. One pass; escaped braces don't count."""
    opened: list[int | None] = []  # where the content of each open brace starts, None if it is not a box's
    found = None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else None
            found = (start, token.start()) if start is not None else found
        elif token[0] == "{":
            opened.append(None)
        elif token[0].startswith("\\boxed"):
            opened.append(token.end())
    return text[slice(*found)].strip() if found else None


def marked_answer(answer: str, window: int = WINDOW) -> str | None:
    """The part of an answer that counts: the last `\\boxed{...}` if there is one, else what follows the last
    "Answer:", else all of it. None if it is longer than `window` characters and marks nothing within them."""
    tail = answer[-window:]
    if (boxed := last_boxed(tail)) is not None:
        return boxed
    marks = list(_ANSWER.finditer(tail))
    if marks:
        return tail[marks[-1].end() :].strip()
    return tail.strip() if len(answer) <= window else None


def words_of(message: Mapping[str, Any]) -> str:
    """The text of a message of a chat, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def visible(text: str) -> str:
    """Without control and direction marks and lone surrogates; line breaks and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def folded(text: str) -> str:
    """Without invisible marks and runs of white space, letters of one kind written alike (NFKC)."""
    text = unicodedata.normalize("NFKC", text)
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())


def normalised(text: str) -> str:
    """Folded, and without case, a final period, and a `\\text{}` around it all."""
    text = folded(text)
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[1].strip()
    return text.removesuffix(".").strip().casefold()
