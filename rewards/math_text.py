"""Rewrites notations of mathematics that the library Math-Verify does not read, and recognises answers that are no
calculation: ranges, dates, scores, ratios, times, lists with dots and chemical formulas.

Tested in tests/rewards/test_math_verify.py.
"""

# ruff: noqa: RUF001  # signs of several scripts

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Literal

from rewards.answer import bare
from rewards.numbers import ENGLISH, HAN, english, han

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_SUPERSCRIPTS = {**{ord(c): str(n) for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}, ord("⁻"): "-", ord("⁺"): "+", ord("ⁿ"): "n"}
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]{1,20}")
_SUBSCRIPTS = {0x2080 + n: str(n) for n in range(10)}
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]{1,20}")
_SIGNS = str.maketrans(
    {
        "°": r"^\circ", "∞": r"\infty", "−": "-", "–": "-", "×": r"\times ", "÷": "/", "⋅": r"\cdot ", "·": r"\cdot ",
        "∙": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≦": r"\le ", "≧": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
        "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∑": r"\sum ", "\u2044": "/", "、": ",",
    }
)  # fmt: skip
_SEPARATOR = re.compile(r"(?<=\d)(?:\\[,! ]|\{,\})+(?=\d{3}(?!\d))")  # thousands separators: 1\,000
_MIXED = re.compile(r"(-?\d{1,9}) +(\d{1,9})/(\d{1,9})")
_REPEATING = re.compile(r"(?<![\d.])(\d{1,18})\.(\d{0,18})\\overline\{(\d{1,18})\}")
_ROOT = re.compile(r"√ ?(\d{1,99}|[a-z]|\([^()]{1,99}\))")
_EXPONENT = re.compile(r"(?<![\w.])(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})[eE]([-+]?\d{1,5})(?![\w.])")
_PYTHON_POWER = re.compile(r"(?<=[\w)])\*\*(?=[\w(-])")
_UPRIGHT = re.compile(r"\\(?:mathrm|text|textrm|operatorname|rm)\s?\{\s?([edij])\s?\}")
_NOON = re.compile(r"(?<=:\d\d)[ ~\\]{0,2}(?:\\text\{ ?)?([ap])\.? ?m\b\.?\}?", re.IGNORECASE)  # 6:30 p.m.
_PERCENT = re.compile(r"(?:\\?%|\\text\{ ?percent\}|\bpercent)$")
_APPROXIMATELY = re.compile(r"[≈≃]|\\(?:approx|simeq|thickapprox)(?:eq)?(?![a-zA-Z])|\b(?:or about|or approximately)\b")
_COUNTER = rf"(?:\s?[{_CJK}]{{0,3}})"
_TO = r"(?:\s?(?:-{1,2}|—|~|∼|\\sim|至|到)\s?|\s?\\text\s?\{\s?(?:to|-)\s?\}\s?|\s{1,2}to\s{1,2})"
_PART = r"(\d{1,15}(?:\.\d{1,15})?)"
_JOINED = re.compile(rf"{_PART}{_TO}{_PART}(?:{_TO}{_PART})?(?:{_TO}{_PART})?")
_DATE = re.compile(r"(\d{4})[/.](\d{1,2})[/.](\d{1,2})|(\d{4})年(\d{1,2})月(\d{1,2})日?")
_RATIO = re.compile(r"(\d{1,15}) ?(?::|\\colon|\\text\{ ?: ?\}) ?(\d{1,15})(?: ?: ?(\d{1,15}))?")
_DOTS = re.compile(r"\\(?:ldots|dots|cdots|dotsc|dotsb)(?![a-zA-Z])|(?<!\.)\.{3}(?!\.)|…")
_ELEMENTS = frozenset((
    "Ac", "Ag", "Al", "Am", "Ar", "As", "At", "Au", "B", "Ba", "Be", "Bi", "Br", "C", "Ca", "Cd", "Ce", "Cl", "Co",
    "Cr", "Cs", "Cu", "Dy", "Er", "Eu", "F", "Fe", "Fr", "Ga", "Gd", "Ge", "H", "He", "Hf", "Hg", "Ho", "I", "In",
    "Ir", "K", "Kr", "La", "Li", "Lu", "Mg", "Mn", "Mo", "N", "Na", "Nb", "Nd", "Ne", "Ni", "Np", "O", "Os", "P",
    "Pa", "Pb", "Pd", "Pm", "Po", "Pr", "Pt", "Pu", "Ra", "Rb", "Re", "Rh", "Rn", "Ru", "S", "Sb", "Sc", "Se", "Si",
    "Sm", "Sn", "Sr", "Ta", "Tb", "Tc", "Te", "Th", "Ti", "Tl", "Tm", "U", "V", "W", "Xe", "Y", "Yb", "Zn", "Zr",
))  # fmt: skip
_CHEMICAL = re.compile(r"(?:\d{1,3})?(?:[A-Z][a-z]?\d{0,3}|[()\[\]]\d{0,3}){1,20}(?:\^?\{?\d?[+-]\}?)?")
_SYMBOL = re.compile(r"[A-Z][a-z]?")


@dataclass(frozen=True)
class Form:
    """An answer that is no calculation. Two forms of the same kind are equal if their parts are equal."""

    kind: Literal["joined", "ratio", "dots", "chemical"]
    parts: tuple[str, ...]


def plain(result: str) -> str:
    """Normalises a result for the library. Removes a final period, dollar signs and LaTeX around the whole result.
    Rewrites signs and notations that the library cannot read, such as full-width digits, blanks between groups of three
    digits, 6.02e23, √, ² and an upright e."""
    text = _SUPERSCRIPT.sub(lambda power: f"^{{{power[0].translate(_SUPERSCRIPTS)}}}", result)
    text = _SUBSCRIPT.sub(lambda index: f"_{{{index[0].translate(_SUBSCRIPTS)}}}", text)
    text = _PYTHON_POWER.sub("^", text)
    text = unicodedata.normalize("NFKC", text).replace(r"\$", "").strip("$ \n\t")
    for _ in range(4):
        before = text
        if not text.endswith(".."):
            text = text.rstrip("。").removesuffix(".").rstrip("$ ")
        text = bare(text)
        if text == before:
            break
    text = _UPRIGHT.sub(
        lambda letter: f" {letter[1]}" if text[max(letter.start() - 1, 0)].isalpha() else letter[1], text
    )
    text = _SEPARATOR.sub("", text.translate(_SIGNS).replace(r"\varnothing", r"\emptyset"))
    text = _EXPONENT.sub(lambda number: rf"{number[1]} \times 10^{{{int(number[2])}}}", text)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1].strip('()')}}}", text)
    text = _NOON.sub(lambda half: f" {half[1].lower()}.m.", _REPEATING.sub(_fraction, text))
    if mixed := _MIXED.fullmatch(text):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    return number_in_words(text) or text


def number_in_words(text: str) -> str | None:
    """Returns the digits of a text that is a number in English or Chinese words, perhaps with a counter: "五个"."""
    if len(text) > 60:
        return None
    if ENGLISH.fullmatch(text) and (value := english(text)) is not None:
        return str(value)
    if (match := re.fullmatch(rf"({HAN.pattern}){_COUNTER}", text)) and (value := han(match[1])) is not None:
        return str(value)
    return None


def spaced(prose: str) -> str:
    """Puts a blank between Chinese, Japanese or Korean characters and digits, letters or formulas that touch them, so
    that the library finds these."""
    return re.sub(rf"(?<=[{_CJK}])(?=[\dA-Za-z\\$(-])|(?<=[\dA-Za-z$)}}])(?=[{_CJK}])", " ", prose)


def approximations(text: str) -> list[str]:
    """Splits `2\\sqrt{3} \\approx 3.46` into its parts, which are all readings of the result. An approximation alone,
    such as `\\approx 3.46`, has one part."""
    return [part for one in _APPROXIMATELY.split(text) if (part := one.strip(" ,;"))] or [text]


def without_percent(text: str) -> tuple[str, bool]:
    """Removes a percent sign at the end of `text`. Returns the text, and True if there was a percent sign."""
    rest = _PERCENT.sub("", text)
    return rest.rstrip("\\ "), rest != text


def form(text: str) -> Form | None:
    """Returns the form of a result that is no calculation, or None. Call `plain` first."""
    if len(text) > 400:
        return None
    if match := _JOINED.fullmatch(text):
        return Form("joined", tuple(_digits(part) for part in match.groups() if part))
    if match := _DATE.fullmatch(text):
        return Form("joined", tuple(_digits(part) for part in match.groups() if part))
    if match := _RATIO.fullmatch(text):
        return Form("ratio", tuple(part for part in match.groups() if part))
    if _DOTS.search(text) and "," in text:
        return Form("dots", tuple(_dotted(text)))
    return chemical(text)


def chemical(text: str, expected: bool = False) -> Form | None:
    """Returns a chemical formula such as `\\mathrm{CO_2}`, or None. A formula has a letter pair such as Na, or two
    symbols and a number; so AB, which may be a line of a figure, is none. F_1F_2 may be a product of variables, and is
    a formula only if one is expected."""
    upright = re.search(r"\\(?:mathrm|text|ce|rm)\s?\{", text) is not None
    letters = re.sub(r"\\(?:mathrm|text|ce|rm)\s?\{|[{}_\s]|\\[,!]", "", text)
    if not _CHEMICAL.fullmatch(letters):
        return None
    symbols = _SYMBOL.findall(letters)
    if not symbols or not all(one in _ELEMENTS for one in symbols):
        return None
    certain = any(len(one) == 2 for one in symbols) or (len(symbols) > 1 and any(c.isdigit() for c in letters))
    product = "_" in text and not upright and not expected
    return Form("chemical", (letters.replace("^", ""),)) if certain and not product and len(letters) > 2 else None


def forms_equal(true: Form, given: Form) -> bool | None:
    """True if both are the same. None for lists with dots, whose parts have to be compared one by one."""
    if true.kind != given.kind:
        return False
    if true.parts == given.parts:
        return True
    if true.kind == "ratio" and not is_time(true) and len(true.parts) == len(given.parts):
        return _reduced(true.parts) == _reduced(given.parts)
    return None if true.kind == "dots" and len(true.parts) == len(given.parts) else False


def is_time(ratio: Form) -> bool:
    """True if a ratio such as 10:30 may be a time."""
    return len(ratio.parts[1]) == 2 and int(ratio.parts[0]) < 25 and int(ratio.parts[1]) < 60


def _reduced(parts: tuple[str, ...]) -> tuple[int, ...]:
    numbers = [int(part) for part in parts]
    divisor = gcd(*numbers) or 1
    return tuple(number // divisor for number in numbers)


def _digits(part: str) -> str:
    whole, point, rest = part.partition(".")
    return (whole.lstrip("0") or "0") + (point + rest.rstrip("0") if rest.rstrip("0") else "")


def _dotted(text: str) -> Iterator[str]:
    for part in text.strip("(){}[]\\ ").split(","):
        if part := part.strip():
            yield "..." if _DOTS.fullmatch(part) else part


def _fraction(repeating: re.Match[str]) -> str:
    whole, once, again = repeating.groups()
    denominator = (10 ** len(again) - 1) * 10 ** len(once)
    return rf"\frac{{{int(whole + once + again) - int(whole + once)}}}{{{denominator}}}"
