"""Finds the prose of a text (the text without code, formulas and quotations) and splits the prose into runs.

A run is a series of words in one script, such as Latin or Cyrillic. The time grows linearly with the length of the text
and is bounded, because long texts are cut.

Tested in tests/rewards/test_language_consistency.py.
"""

# ruff: noqa: RUF001  # this file has letters of many scripts

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rewards.text import visible

MAX_CHARS = 1 << 18  # a longer text is cut to its first and last MAX_CHARS / 2 characters

RANGES = {
    "Latin": "A-Za-zªºÀ-ÖØ-öø-ʯḀ-ỿ",
    "Greek": "Ͱ-ͽͿ-Ͽἀ-῿",
    "Cyrillic": "Ѐ-ԯ",
    "Armenian": "Ա-Ֆՙ-֏",
    "Hebrew": "\u05b0-\u05f4",
    "Arabic": "\u0620-\u063f\u0641-\u065f\u066e-\u06d3\u06d5\u06fa-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc",
    "Devanagari": "\u0900-\u0963\u0970-\u097f",
    "Bengali": "\u0980-\u09e3",
    "Gurmukhi": "\u0a00-\u0a65\u0a70-\u0a7f",
    "Gujarati": "\u0a80-\u0ae3",
    "Tamil": "\u0b80-\u0be5",
    "Telugu": "\u0c00-\u0c65",
    "Kannada": "\u0c80-\u0ce5",
    "Malayalam": "\u0d00-\u0d65",
    "Thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
    "Georgian": "\u10a0-\u10ff",
    "Hangul": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "Kana": "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d",
    "Han": "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
}
WORD = re.compile(
    "|".join(f"(?P<{s}>[{r}][{r}\u0300-\u036f]*+(?:['’][{r}\u0300-\u036f]++)*+)" for s, r in RANGES.items())
)
_LETTERS_PER_SIGN = {"Han": 3, "Kana": 2, "Hangul": 2}
UNSPACED = {"Han": 4, "Kana": 8, "Thai": 12}  # scripts without blanks between words -> most letters of a word
_HIRAGANA, _HIRAGANA_OR_HAN = re.compile("[ぁ-ゖ]"), re.compile(f"[ぁ-ゖ{RANGES['Han']}]")

_FENCE = re.compile(r"^[ \t>]{0,16}+(`{3,}+|~{3,}+)([^\n]*+)$", re.MULTILINE)
_ENVIRONMENT = re.compile(
    r"\\(begin|end)\{(?:equation|align|aligned|alignat|gather|gathered|multline|split|cases|array|eqnarray|math|"
    r"displaymath|tabular|verbatim|lstlisting|minted|tikzpicture|[a-zA-Z]?matrix|smallmatrix)\*?\}"
)
# If a start mark (such as a dollar sign) has no end mark, the text after the start mark must still count as prose, and
# the search for the end mark must take only linear time. So this search has a maximum length, and stops at the next
# start mark of the same kind.
_NOT_PROSE = re.compile(
    r"""
      `{1,2}+[^`\n]{1,400}+`{1,2}+
    | \$\$[^$]{1,4000}+\$\$
    | \$(?!\s)[^$\n]{1,1000}+(?<!\s)\$(?!\d)
    | \\\[(?:[^\\]|\\[^][]){0,4000}+\\\]
    | \\\((?:[^\\]|\\[^()]){0,2000}+\\\)
    | \\(?:begin|end)\{[a-zA-Z]{1,30}+\*?\} | \\[a-zA-Z]++\*?
    | (?:https?|ftp)://[^\s<>]++ | (?<!\w)www\.[^\s<>]++
    | </?[a-zA-Z][^<>\n]{0,200}+>
    | "[^"\n]{1,300}+" | “[^“”\n]{1,300}+” | „[^„“”\n]{1,300}+[“”] | «[^«»\n]{1,300}+»
    | 「[^「」\n]{1,300}+」 | 『[^『』\n]{1,300}+』 | 《[^《》\n]{1,100}+》
    | ^[ ]{0,3}>[^\n]*+$
    | \b(?:sin|cos|tan|log|exp|lim|max|min|mod|gcd|lcm)\b
    | (?<![A-Za-z0-9_])(?=[A-Za-z_]{0,40}+\d)[A-Za-z0-9_]++
    """,
    re.VERBOSE | re.MULTILINE,
)
_SENTENCE = re.compile(r"(?:[^.!?。！？।؟；\n]|[.!?](?!\s|\Z))++")
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}


@dataclass(frozen=True)
class Run:
    """Consecutive words in the same script, within one sentence."""

    script: str
    text: str
    words: int
    weight: float


def script_runs(prose: str) -> dict[str, list[Run]]:
    """Returns a mapping from script to runs. A run ends where the script changes or the sentence ends.

    Han characters near hiragana count as Japanese.
    """
    found: dict[str, list[Run]] = {}
    japanese = _is_japanese(prose)
    for sentence in _SENTENCE.findall(prose):
        words = [(m.lastgroup or "", m[0]) for m in WORD.finditer(sentence)]
        words = [(s, w) for s, w in words if not (s == "Greek" and len(w) < 3)]  # skips Greek letters of formulas
        han = sum(len(w) for s, w in words if s == "Han")
        # A short Japanese phrase may have only Han characters. A Japanese sentence of 12 Han characters has kana too.
        if _is_japanese(sentence) or (japanese and han < 12):
            words = [("Kana" if s == "Han" else s, w) for s, w in words]
        korean = any(s == "Hangul" for s, _ in words)
        for run in _joined(words):
            # A few Han characters in a Korean sentence do not count: they only explain a Korean word.
            if not (run.script == "Han" and korean and len(run.text) <= 4):
                found.setdefault(run.script, []).append(run)
    return found


def without_code_and_quotations(text: str) -> str:
    """Replaces code, formulas, quotations, URLs, tags and words with digits by white space."""
    text = _cut(text, _fenced(text))
    text = _cut(text, _environments(text))
    return _NOT_PROSE.sub(" ", text)


def _fenced(text: str) -> Iterator[tuple[int, int]]:
    opened: re.Match[str] | None = None
    for line in _FENCE.finditer(text):
        if opened is None:
            opened = line
        elif line[1].startswith(opened[1]) and not line[2].strip():
            yield opened.start(), line.end()
            opened = None


def _environments(text: str) -> Iterator[tuple[int, int]]:
    depth, start = 0, 0
    for mark in _ENVIRONMENT.finditer(text):
        if mark[1] == "begin":
            start = start if depth else mark.start()
            depth += 1
        elif depth:
            depth -= 1
            if not depth:
                yield start, mark.end()


def _cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    kept, position = [], 0
    for start, end in spans:
        kept.append(text[position:start])
        position = end
    return "\n".join([*kept, text[position:]])


def plain(text: str) -> str:
    """Returns at most MAX_CHARS visible characters of a text. Full-width letters become ASCII."""
    if len(text) > MAX_CHARS:
        text = text[: MAX_CHARS // 2] + "\n" + text[-MAX_CHARS // 2 :]
    return visible(text).translate(_FULL_WIDTH)


def _joined(words: Sequence[tuple[str, str]]) -> Iterator[Run]:
    start = 0
    for end in range(1, len(words) + 1):
        if end == len(words) or words[end][0] != words[start][0]:
            script, texts = words[start][0], [word for _, word in words[start:end]]
            # Single Latin letters are mostly variables. They stay in the text but have no weight.
            weighing = [t for t in texts if script != "Latin" or len(t) > 1]
            weight = _LETTERS_PER_SIGN.get(script, 1) * sum(len(t) for t in weighing)
            if weight:
                yield Run(script, ("" if script in UNSPACED else " ").join(texts), len(weighing), float(weight))
            start = end


def _is_japanese(text: str) -> bool:
    """True if more than 8% of the hiragana and Han characters of a text are hiragana. Katakana do not count, because
    Chinese texts may have them."""
    return len(_HIRAGANA.findall(text)) > 0.08 * len(_HIRAGANA_OR_HAN.findall(text))
