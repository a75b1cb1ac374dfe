"""Normalises text. Rewards that compare text use these functions.

The time of each function is linear in the length of the text.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np

from rewards.answer import bare

_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20, 0x2212: 0x2D}
_ESCAPED = re.compile(r"\\([%$#&_*{} ])|(?<=\S)~(?=\S)|\{(,)\}")


def words_of(message: Mapping[str, Any]) -> str:
    """Returns the text of a chat message, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def visible(text: str) -> str:
    """Returns `text` without control characters, direction marks and lone surrogates. Line breaks and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def wide_folded(text: str) -> str:
    """Replaces full-width letters, digits and signs by ASCII. The number of characters stays the same."""
    return text.translate(_WIDE)


def folded(text: str) -> str:
    """Converts `text` to Unicode form NFKC, removes invisible characters, and replaces each sequence of white space by
    one blank."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())


def normalised(text: str) -> str:
    """Applies `folded`, and makes all letters lower case. Removes a final period, markdown and LaTeX around the whole
    text, and the backslash before signs such as % and $."""
    text = bare(folded(text))
    for _ in range(2):  # the period may stand inside or outside of `**`
        if text.endswith((".", "\u3002")) and not text.endswith(".."):
            text = bare(text[:-1])
    return unescaped(text).strip().casefold()


def unescaped(text: str) -> str:
    """Removes the backslash before signs such as %, as LaTeX and markdown need it, and reads `~` between two words as a
    blank and `{,}` as a comma."""
    return _ESCAPED.sub(lambda sign: sign[1] or sign[2] or " ", text)


def plain_number(value: float) -> str:
    """Writes a number without an exponent and without a superfluous fraction: 5.0 as "5", 1e-05 as "0.00001"."""
    return np.format_float_positional(value, trim="-") if math.isfinite(value) else str(value)
